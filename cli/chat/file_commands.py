"""Commands about files: reading, saving, loading, exporting, copying."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cli.chat.clipboard import copy_text
from cli.chat.commands import command
from cli.chat.context_end import WARN_SHARE
from cli.terminal.wrap import clip
from hybrid_rt.conversation import text_event, to_json, to_markdown
from quant.errors import Dsr1Error, UsageError
from quant.files import put_in_place

if TYPE_CHECKING:
    from cli.chat.loop import Chat

MAX_FILE_BYTES = 64 << 20
LISTED = 20


@command("/read", "FILE", "put a text file before the next question", takes_path=True)
def read(chat: "Chat", argument: str) -> None:
    path = parse_path(argument, "/read")
    text = read_text(path)
    content = f"File {path.name}:\n\n{text}\n"
    tokens = len(chat.engine.tokenizer.encode(content))
    room = chat.engine.context - chat.history_tokens() - chat.attached_tokens()
    if tokens >= room:
        raise Dsr1Error(
            f"{path} has {tokens:,} tokens and the context has room for {max(0, room):,}; "
            "give a part of it, begin anew with /new, or start with a larger --context"
        )
    chat.attachments.append(content)
    chat.screen.line(f"{path}: {tokens:,} tokens, put before the next question", "dim")
    if tokens > room - (1 - WARN_SHARE) * chat.engine.context:
        chat.screen.line(f"that leaves {room - tokens:,} of {chat.engine.context:,} tokens of context", "warning")


def parse_path(argument: str, name: str) -> Path:
    """A file's name, which may hold spaces and stand in quotes."""
    text = argument.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    if not text:
        raise UsageError(f"{name} takes the name of a file")
    path = Path(text).expanduser()
    return path if path.exists() or "\\ " not in text else Path(text.replace("\\ ", " ")).expanduser()


def read_text(path: Path) -> str:
    """The text of a file; bytes that are not UTF-8 become U+FFFD. Raises Dsr1Error if it cannot be one."""
    try:
        if not path.is_file():
            raise Dsr1Error(f"{path} is {'a folder' if path.is_dir() else 'no file'}; give a text file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise Dsr1Error(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; give a part of it")
        content = path.read_bytes()
    except OSError as error:
        raise Dsr1Error(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if b"\0" in content[:8192]:
        raise Dsr1Error(f"{path} is no text; give a text file")
    return content.decode("utf-8", "replace")


@command("/save", "NAME", "name the conversation; it is always kept")
def save(chat: "Chat", argument: str) -> None:
    if not argument:
        raise UsageError("/save takes a name, under which /load and --session find the conversation")
    if not chat.talk.conversation.turns:
        raise UsageError("nothing was asked yet; there is nothing to save")
    if any(saved.conversation.name == argument and saved.path != chat.path() for saved in chat.talk.saved.list()):
        raise UsageError(f"another conversation is named {argument}; give another name")
    chat.talk.record(text_event("name", argument))
    chat.screen.line(f"saved as {argument}: {chat.path()}", "dim")


@command("/load", "NAME", "continue a conversation: its name, the beginning of its id, or its number in /sessions")
def load(chat: "Chat", argument: str) -> None:
    if not argument:
        raise UsageError("/load takes a name, an id or a number; /sessions lists them")
    found = chat.talk.saved.list()
    by_number = argument.isdigit() and len(argument) < 4 and 1 <= int(argument) <= len(found)
    saved = found[int(argument) - 1] if by_number else chat.talk.saved.find(argument)
    if saved.path == chat.path():
        raise UsageError("that is this conversation")
    chat.resume(saved)


@command("/sessions", "[all]", "the conversations that are kept")
def sessions(chat: "Chat", argument: str) -> None:
    found = chat.talk.saved.list()
    for number, saved in enumerate(found if argument == "all" else found[:LISTED], 1):
        mark = "here" if saved.path == chat.path() else "open" if saved.is_open else ""
        when = time.strftime("%d %b %H:%M", time.localtime(saved.changed))
        turns = len(saved.conversation.turns)
        line = f"{number:3}  {saved.id}  {when}  {turns:3} turns  {mark:4}  {saved.conversation.title}"
        chat.screen.line(clip(line, chat.screen.width))
    if not found:
        chat.screen.line("there are none yet", "dim")
    elif len(found) > LISTED and argument != "all":
        chat.screen.line(f"{len(found) - LISTED} older ones: /sessions all", "dim")


@command("/copy", "", "the last answer to the clipboard")
def copy(chat: "Chat", _argument: str) -> None:
    answers = [turn.answer for turn in chat.talk.conversation.turns if turn.answer]
    if not answers:
        raise UsageError("there is no answer to copy yet")
    chat.screen.line(copy_text(answers[-1], chat.screen), "dim")


@command("/export", "FILE.md|FILE.json", "write the conversation to a file", takes_path=True)
def export(chat: "Chat", argument: str) -> None:
    path = parse_path(argument, "/export")
    conversation = chat.talk.conversation
    if path.suffix not in (".md", ".json"):
        raise UsageError(f"{path} ends in neither .md nor .json; give one of these")
    if path.exists():
        raise UsageError(f"{path} exists; give another name")
    as_json = path.suffix == ".json"
    text = json.dumps(to_json(conversation), ensure_ascii=False, indent=2) if as_json else to_markdown(conversation)
    try:
        with put_in_place(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise Dsr1Error(f"{path} cannot be written ({error.strerror}); give another place") from None
    chat.screen.line(f"{path}: {len(conversation.turns)} turns", "dim")

"""The transcript and the screenshots of docs/chat.md: `python -m tools.record_chat FOLDER`, with tmux.

Drives the chat as tests/test_chat_tmux.py does and writes what is to be seen: chat-*.svg and chat-transcript.txt.
"""

import io
import os
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.tmux import Terminal

CHAT = ["-c", "from cli.main import main; main()", "chat", "nano-r1"]
DONE = r"context [\d,]+ of 4,096"
SIZES = {"small": (80, 24), "large": (200, 50)}


def picture(terminal: Terminal, columns: int, path: Path, title: str) -> None:
    """The screen as SVG."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(Text.from_ansi(terminal.screen(styled=True).rstrip("\n")), soft_wrap=True)
    console.save_svg(str(path), title=title)


def converse(chat: Terminal) -> None:
    """What the transcript shows."""
    for number, question in enumerate(("What is 47 * 36?", "你好！ What is 123 + 456?"), 1):
        chat.type(question)
        chat.wait_for(rf"(?:{DONE}[\s\S]*){{{number}}}")
        chat.wait_for("^>>> ?$", history=False)
    for command, shown in (("/think show", "^282$|^321"), ("/undo", "took back"), ("/save sums", "saved as")):
        chat.type(command)
        chat.wait_for(shown)
        chat.wait_for("^>>> ?$", history=False)


def record(folder: Path, name: str, size: tuple[int, int], env: dict[str, str]) -> None:
    chat = Terminal(CHAT, *size, env)
    chat.wait_for("^>>> ?$")
    converse(chat)
    picture(chat, size[0], folder / f"chat-{name}.svg", "dsr1 chat")
    first = chat.screen(history=True)
    chat.press("C-d")
    chat.wait_for_end()
    again = Terminal([*CHAT, "--resume"], *size, env)
    again.wait_for("^>>> ?$")
    again.type("What is 12 + 30?")
    again.wait_for("= 42")
    again.wait_for("^>>> ?$", history=False)
    if name == "small":
        text = f"$ dsr1 chat\n{first.rstrip()}\n\n$ dsr1 chat --resume\n{again.screen(history=True).rstrip()}\n"
        kept = [line.rstrip() for line in text.split("\n") if not re.match("Pane is dead|nano-r1 · ", line)]
        (folder / "chat-transcript.txt").write_text("\n".join(kept).replace(env["XDG_DATA_HOME"], "~/.local/share"))
    chat.close()
    again.close()


def main() -> None:
    folder = Path(sys.argv[1])
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as home:
            record(folder, name, size, {"XDG_DATA_HOME": home, "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", "")})
    streamed = Terminal(["-m", "tests.streamed_answer", "0.002"], 80, 42, {})
    streamed.wait_for("^END$")
    picture(streamed, 80, folder / "chat-markdown.svg", "Markdown, wide characters, hostile text")
    streamed.close()


if __name__ == "__main__":
    main()

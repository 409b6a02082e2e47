"""The chat's commands, on a small model, with a user who answers from a list."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from cli.chat.commands import COMMANDS, find
from cli.chat.history import SharedHistory
from cli.chat.loop import Chat
from cli.chat.reader import Reader, is_open, unquoted
from cli.chat.settings import Settings
from cli.options import RunOptions
from hybrid_rt.sampling import Sampling
from quant.errors import Dsr1Error, UsageError

CONTEXT = 512


class Answers:
    """In the place of the line editor: what the user chooses when asked."""

    def __init__(self) -> None:
        self.choices: list[str] = []
        self.asked: list[str] = []

    def choose(self, question: str, keys: str) -> str:
        self.asked.append(question)
        return self.choices.pop(0)


@pytest.fixture
def chat(chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    options = RunOptions(
        model=str(chat_folder), context=CONTEXT, temperature=0, max_new_tokens=12, think=False, threads=1, cache=False
    )
    chat = Chat(options)
    chat.reader = Answers()  # type: ignore[assignment]
    chat.screen.file = StringIO()
    yield chat
    chat.leave()


def shown(chat: Chat) -> str:
    """What the screen got since the last look."""
    assert isinstance(chat.screen.file, StringIO)
    text = chat.screen.file.getvalue()
    chat.screen.file = StringIO()
    return text


def do(chat: Chat, *lines: str) -> str:
    shown(chat)
    for line in lines:
        chat.take(line)
    return shown(chat)


def users(chat: Chat) -> list[str]:
    return [turn.user for turn in chat.talk.conversation.turns]


def test_asking_and_taking_back(chat: Chat) -> None:
    text = do(chat, "One?", "Two?")
    assert "tokens" in text and "reused" in text and users(chat) == ["One?", "Two?"]
    assert "took back: Two?" in do(chat, "/undo")
    assert users(chat) == ["One?"]
    first = chat.talk.conversation.turns[0]
    assert "will be the same" in do(chat, "/retry")
    assert chat.talk.conversation.turns == [first]


def test_unknown_commands(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    for typed, meant in (("/sesions", "/sessions"), ("/hlep", "/help"), ("/thnk", "/think"), ("/xyzzy", "/help")):
        do(chat, typed)
        assert meant in capsys.readouterr().err


def test_commands_before_anything_was_asked(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("/undo", "/retry", "/edit", "/save x", "/copy", "/summary", "/load", "/drop x", "/read", "/export"):
        do(chat, name)
        assert capsys.readouterr().err, name
    assert users(chat) == []


def test_every_command_has_help(chat: Chat) -> None:
    text = do(chat, "/help")
    assert all(name in text for name in COMMANDS)
    needed = "help new undo retry edit system think budget temp seed set show read save load sessions copy export bench"
    assert {f"/{name}" for name in (*needed.split(), "exit")} <= COMMANDS.keys()
    assert find("/quit").name == "/exit"


def test_settings(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    do(chat, "/temp 0.5", "/seed 7", "/budget 100", "/set top_p 0.9", "/think on", "/think full")
    sampling = chat.settings.sampling
    assert (sampling.temperature, sampling.seed, sampling.think_budget, sampling.top_p) == (0.5, 7, 100, 0.9)
    assert chat.settings.think is True and chat.settings.full_thinking
    assert "temperature = 0.5" in do(chat, "/set")
    for wrong in ("/temp hot", "/temp -1", "/seed 1.5", "/set nothing 1", "/set top_p", "/think maybe", "/show all"):
        do(chat, wrong)
        assert capsys.readouterr().err, wrong
    assert chat.settings.sampling == sampling
    do(chat, "/seed random", "/budget none")
    assert chat.settings.sampling.seed is None and chat.settings.sampling.think_budget is None


def test_the_system_prompt(chat: Chat) -> None:
    assert "none" in do(chat, "/system")
    do(chat, "/system Be kind.", "One?")
    assert chat.talk.conversation.messages()[0] == {"role": "system", "content": "Be kind."}
    do(chat, "/new")
    assert users(chat) == [] and chat.talk.conversation.system == "Be kind."
    do(chat, "/system none")
    assert chat.talk.conversation.messages() == []


def test_editing_the_last_question(chat: Chat) -> None:
    do(chat, "One?", "/edit")
    assert chat.editing == "One?"


def test_reading_files(chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my [bold]notes.txt"
    path.write_bytes(b"\x1b[2Jtext \xff and more\n")
    text = do(chat, f"/read '{path}'")
    assert "tokens, put before the next question" in text
    do(chat, "What is in it?")
    assert "text \ufffd and more" in users(chat)[0] and users(chat)[0].endswith("What is in it?")
    assert chat.attachments == []
    (tmp_path / "large.txt").write_text("x" * 2000)
    (tmp_path / "zeros").write_bytes(bytes(100))
    for name, why in (("large.txt", "the context has room for"), ("zeros", "is no text"), ("gone", "is no file")):
        do(chat, f"/read {tmp_path / name}")
        assert why in capsys.readouterr().err
    do(chat, "/new")
    (tmp_path / "half.txt").write_text("x" * 440)
    assert "that leaves" in do(chat, f"/read {tmp_path / 'half.txt'}")


def test_saving_and_loading(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    do(chat, "One?", "/save first talk", "/new", "Two?")
    assert "first talk" in (listed := do(chat, "/sessions")) and "here" in listed
    do(chat, "/load first talk")
    assert users(chat) == ["One?"]
    do(chat, "/load first talk")
    assert "that is this conversation" in capsys.readouterr().err
    do(chat, "/load 2" if "Two?" in listed.splitlines()[0] else "/load 1")
    do(chat, "/save first talk")
    do(chat, "/load nothing")
    assert "there is no conversation nothing" in capsys.readouterr().err


def test_exporting(chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    do(chat, "One?", f"/export {tmp_path}/a.md", f"/export {tmp_path}/a b.json")
    assert "One?" in (tmp_path / "a.md").read_text()
    assert json.loads((tmp_path / "a b.json").read_text())["messages"][0]["content"] == "One?"
    do(chat, f"/export {tmp_path}/a.md")
    assert "exists" in capsys.readouterr().err
    do(chat, f"/export {tmp_path}/a.txt", f"/export {tmp_path}/no/a.md")
    assert "cannot be written" in capsys.readouterr().err


def test_showing(chat: Chat) -> None:
    assert "no answer yet" in do(chat, "/show stats")
    do(chat, "One?")
    assert "1 turns" in do(chat, "/show stats")
    assert " tokens" in (text := do(chat, "/show tokens")) and "'O'" in text.replace('"', "'")
    assert "{% for message" in do(chat, "/show template")


@pytest.mark.parametrize("choice", ["n", "s", "d", "c"])
def test_the_end_of_the_context(chat: Chat, choice: str, capsys: pytest.CaptureFixture[str]) -> None:
    while chat.history_tokens() < 0.75 * CONTEXT:
        do(chat, "x" * 60)
    before = len(users(chat))
    assert "of context are used" in do(chat, "y" * 60)
    chat.reader.choices = [choice, "d"]  # type: ignore[attr-defined]
    text = do(chat, "z" * 90)
    errors = capsys.readouterr().err
    assert len(chat.reader.asked) >= 1 and "the context holds 512" in text.replace("\n", " ")  # type: ignore[attr-defined]
    if choice == "n":
        assert users(chat) == ["z" * 90]
    elif choice == "d":
        assert users(chat)[-1] == "z" * 90 and len(users(chat)) <= before + 1 and "dropped the oldest" in text
    elif choice == "c":
        assert len(users(chat)) == before + 1 and users(chat)[-1] == "y" * 60
    else:
        assert chat.talk.conversation.summary or "gave no summary" in errors or "not even the last" in errors


def test_a_question_that_fits_nowhere(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    do(chat, "x" * 2 * CONTEXT)
    assert "this question alone has" in capsys.readouterr().err and users(chat) == []
    assert "tokens are left for the answer" in do(chat, "x" * (CONTEXT - 40))


def test_quotes_and_pastes(tmp_path: Path) -> None:
    assert is_open('"""a') and is_open('"""') and not is_open('"""a"""') and not is_open("a")
    assert unquoted('"""\na\nb\n"""') == "a\nb" and unquoted("a") == "a" and unquoted('"""a') == '"""a'
    reader = Reader({}, (), lambda: "", False, tmp_path / "history")
    assert reader.shortened("a\r\nb\rc") == "a\nb\nc"
    stand_in = reader.shortened("x" * 5000)
    assert stand_in == "[paste 1: 1 lines, 5,000 characters]" and reader.pastes[stand_in] == "x" * 5000


def test_history_is_shared(tmp_path: Path) -> None:
    first, second = SharedHistory(tmp_path / "history"), SharedHistory(tmp_path / "history")
    for history, text in ((first, "one\nline"), (second, "two \udc80"), (first, "三")):
        history.store_string(text)
    with (tmp_path / "history").open("ab") as file:
        file.write(b"damaged\n\xff\n[1]\n")
    assert list(SharedHistory(tmp_path / "history").load_history_strings()) == ["三", "two \udc80", "one\nline"]
    SharedHistory(tmp_path / "history" / "no").store_string("lost")


def test_settings_say_what_is_wrong() -> None:
    settings = Settings(Sampling())
    with pytest.raises(UsageError, match="there is no setting"):
        settings.set("colour", "red")
    with pytest.raises(Dsr1Error):
        settings.set("think_at_least", "-1")

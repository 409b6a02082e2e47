"""The chat in a real terminal, as a user drives it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from hybrid_rt.nano_store import nano_store
from quant.user_cache import user_cache
from tests.streamed_answer import ANSWER
from tests.tmux import MISSING, Terminal

pytestmark = pytest.mark.skipif(MISSING, reason="tmux is not installed; apt-get install tmux")

SIZES = [(80, 24), (200, 50)]
CHAT = ["-c", "from cli.main import main; main()", "chat", "nano-r1"]
PROMPT = r"^>>> ?$"
IDLE = r"^>>> ?\s+nano-r1 · context"  # an empty line to type in, and the line below it
DONE = r"^[\d,]+ tokens?, [\d.,]+/s · "  # the line of figures behind an answer
HOSTILE = "\x1b[31mred\x1b[0m\x07 [bold]x[/bold] \x9b2J\r\x08 " + "很长" * 40 + "\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a user of its own, with the kernels and the store that this machine has already."""
    nano_store(None)
    folder = tmp_path_factory.mktemp("home")
    cache = folder / "cache" / "dsr1"
    cache.mkdir(parents=True)
    for path in user_cache().iterdir():
        if path.name != "latents":
            (cache / path.name).symlink_to(path)
    return folder


@pytest.fixture
def user(home: Path, tmp_path: Path) -> Iterator["User"]:
    user = User(home, tmp_path)
    yield user
    user.close()


class User:
    """Somebody with terminals."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.env = {"XDG_CACHE_HOME": str(home / "cache"), "XDG_DATA_HOME": str(folder / "data")}
        self.folder, self.terminals = folder, []  # type: tuple[Path, list[Terminal]]

    def opens(self, words: list[str], size: tuple[int, int], **env: str) -> Terminal:
        self.terminals.append(Terminal(words, *size, {**self.env, **env}))
        return self.terminals[-1]

    def close(self) -> None:
        for terminal in self.terminals:
            terminal.close()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_session(user: User, size: tuple[int, int]) -> None:
    chat = user.opens(CHAT, size)
    started = chat.wait_for(PROMPT)
    assert "nano-r1 on cpu: RAM" in started and "/help lists the commands" in started

    chat.type("Hello!")
    chat.wait_for(DONE, 1)
    chat.type("What is 47 * 36?")
    screen = chat.wait_for(r"^47 \* 36 = 1692$")
    chat.wait_for(DONE, 2)
    assert re.search(r"^thought for \d+ s, \d+ tokens$", screen, re.MULTILINE)
    assert "282" not in screen  # its thinking is folded
    chat.type("/think show")
    assert "1692" in chat.wait_for("^282$")

    interrupt(chat)
    chat.type("/undo")
    chat.wait_for(r"took back: What is 12 \+ 30\?")
    chat.type("/retry")
    chat.wait_for(r"^47 \* 36 = 1692$", 2)

    (user.folder / "my notes.txt").write_bytes(HOSTILE.encode() + b"\xff\xfe")
    chat.type(f"/read {user.folder}/my notes.txt")
    chat.wait_for(r"put before the next\s+question")
    chat.type("你好，47 加 36 等于多少？")
    screen = chat.wait_for(rf">>> 你好，47 加 36 等于多少？[\s\S]*{DONE}")
    assert "\x1b" not in screen and "[31mred" not in chat.screen(styled=True)

    chat.type("/save 计算 sums")
    chat.wait_for("saved as 计算 sums")
    chat.wait_for(PROMPT, history=False)
    chat.press("C-d")
    chat.wait_for_end()

    again = user.opens([*CHAT, "--resume"], size)
    screen = again.wait_for(PROMPT)
    found = re.search(r"resuming 计算 sums of .*: ([\d,]+) tokens, ([\d,]+) of\s+them from the\s+cache", screen)
    assert found is not None and found[1] == found[2]
    assert "你好" in screen
    again.type("/sessions")
    again.wait_for(r"3 turns\s+here\s+计算 sums")
    again.type("What is 12 + 30?")
    again.wait_for(r"^12 \+ 30 = 42$")


def interrupt(chat: Terminal) -> None:
    """Stop an answer with Ctrl+C. Where this test was held up until the answer was whole, ask again."""
    chat.type("/set think_at_least 4000")
    chat.wait_for("think_at_least = 4000")
    for attempt in range(1, 6):
        chat.type("What is 12 + 30?")
        if "thinking " in chat.wait_for(rf"^thinking \d+ s, \d+ tokens$|(?:cut at the limit[\s\S]*){{{attempt}}}"):
            chat.press("C-c")
        if "stopped" in chat.wait_for(rf"stopped|(?:cut at the limit[\s\S]*){{{attempt}}}"):
            break
        chat.type("/undo")
    chat.wait_for("stopped")
    chat.type("/set think_at_least none")
    chat.wait_for("think_at_least = none")


def test_what_streams_stays_and_nothing_else_does(user: User) -> None:
    for size in SIZES:
        terminal = user.opens(["-m", "tests.streamed_answer", "0.002"], size)
        whole = terminal.wait_for("^END$")
        assert "thinking" not in whole and "reading" not in whole and "and so on" not in whole
        assert re.search(r"^thought for \d+ s, 222 tokens$", whole, re.MULTILINE)
        assert re.search("^名称 │ name  │ size$", whole, re.MULTILINE)
        assert re.search("^乙乙 │ beta  │ 2048$", whole, re.MULTILINE)
        assert "    return x * 2" in whole and "E = mc^2" in whole and "• 第二点：x * y" in whole
        assert r"\x1b[31mred\x1b[0m \x1b]0;title\x07 [bold]markup[/bold]" in whole
        assert "\u202e" not in whole
        paragraph = next(line for line in whole.split("\n") if line.startswith("这是"))
        whole_paragraph = re.sub(r"\*\*|`", "", ANSWER.split("\n")[2])
        assert paragraph == whole_paragraph or cell_len(paragraph) in (78, 79) and size[0] == 80


def test_a_terminal_that_is_resized_meanwhile(user: User) -> None:
    terminal = user.opens(["-m", "tests.streamed_answer", "0.005"], (100, 30))
    terminal.wait_for("^thinking")
    terminal.resize(50, 20)
    terminal.wait_for("^thought for")
    terminal.resize(120, 40)
    whole = terminal.wait_for("^END$")
    assert len(re.findall("^thought for", whole, re.MULTILINE)) == 1
    assert len(re.findall("比较 Comparison", whole)) == 1
    assert "乙乙 │ beta  │ 2048" in whole


def test_without_colours_the_text_is_plain(user: User) -> None:
    terminal = user.opens(["-m", "tests.streamed_answer", "0"], (80, 24), NO_COLOR="1")
    terminal.wait_for("^END$")
    styled = terminal.screen(styled=True, history=True)
    assert not re.search(r"\x1b\[[0-9;]*m", styled) and "thinking" not in styled


def test_lines_that_are_edited(user: User) -> None:
    chat = user.opens(CHAT, (80, 24))
    chat.wait_for(PROMPT)
    chat.type('"""What is')
    chat.wait_for(r"^\.\.\.")
    chat.type('47 * 36?"""')
    chat.wait_for("= 1692")
    chat.press("M-Enter")
    chat.type("12 + 30?")
    chat.wait_for("= 42")
    chat.wait_for(IDLE, history=False)
    chat.paste("x" * 1500 + "\n" + "y" * 1500)
    chat.wait_for(r"\[paste 1: 2 lines, 3,001 characters\]")
    chat.press("C-c")
    chat.type("/retri")
    chat.wait_for(r"there is no command /retri; did you mean /retry\?")
    chat.type(f"/rea{os.sep}x")
    chat.press("/se", "Tab")
    chat.wait_for("/sessions")
    chat.press("C-c")
    chat.press("C-c")
    chat.wait_for(r"leave\? \[y\]es or \[n\]o:")
    chat.type("n")
    chat.press("Up")
    chat.press("C-c")
    second = user.opens(CHAT, (80, 24))
    second.wait_for(PROMPT)
    second.type("/sessions")
    screen = second.wait_for(r"turns\s+open")
    second.type(f"/load {re.findall(r'[0-9]{8}-[0-9]{6}-[0-9a-f]{4}', screen)[0]}")
    second.wait_for("is\\s+open\\s+in\\s+another\\s+dsr1")
    second.wait_for(PROMPT, history=False)
    second.press("C-d")
    second.wait_for_end()

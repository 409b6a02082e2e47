"""Markdown on a terminal: what it looks like, and that how the text was cut makes no difference."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from cli.escape import escape
from cli.terminal.inline import Piece
from cli.terminal.markdown import MarkdownStream
from cli.terminal.table import render
from cli.terminal.wrap import clip, wrap

EVERYTHING = """\
# Title with **bold**
A paragraph with *emphasis*, `code * x`, **bold `c` text**, 47 * 36 = 1692, 2**3, a_b_c and $x_1 * y_2$.
- an item that is long enough to go on in a second line
  - 中文字符很长很长很长，很长很长很长很长很长很长。很长
1. first **unclosed
> a quotation that goes on long enough to wrap
```python
def f(x):
    return x * 2  # **not bold**
```
| a | b | c |
|---|:-:|--:|
| 1 | 中文 | long text |

$$
E = mc^2 * 1
$$
\\[ x*y*z \\]
---
done 👩‍👩‍👧 ok *
"""


def render_in(cuts: list[str], width: int = 40) -> list[Piece]:
    stream = MarkdownStream(lambda: width)
    pieces = [piece for cut in cuts for piece in stream.feed(cut)]
    return [*pieces, *stream.finish()]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def styled(text: str, style: str, width: int = 200) -> str:
    """What of `text` is shown in `style`."""
    return "".join(piece.text for piece in render_in([text], width) if style in piece.style.split())


def by_character(pieces: list[Piece]) -> list[tuple[str, str]]:
    return [(char, piece.style) for piece in pieces for char in piece.text]


@given(st.lists(st.integers(0, len(EVERYTHING))), st.sampled_from([12, 40, 79]))
def test_cuts_make_no_difference(cuts: list[int], width: int) -> None:
    edges = sorted({0, len(EVERYTHING), *cuts})
    parts = [EVERYTHING[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert by_character(render_in(parts, width)) == by_character(render_in([EVERYTHING], width))


@given(st.text(alphabet="ab1 *_`$\\|#->.[]()\n~中é\u200b️", max_size=80), st.lists(st.integers(0, 80), max_size=6))
def test_any_text_comes_out_whole_however_it_is_cut(text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    shown = text_of(render_in(parts, 20))
    assert by_character(render_in(parts, 20)) == by_character(render_in([text], 20))
    assert set(re.findall("[ab1中é]", text)) == set(re.findall("[ab1中é]", shown))


@given(st.text(alphabet="abc 中文，。 é", max_size=200), st.integers(12, 60))
def test_lines_keep_to_the_width(text: str, width: int) -> None:
    for line in text_of(render_in([text], width)).split("\n"):
        longest = max(map(cell_len, re.split("[ 中文]", line)), default=0)
        assert cell_len(line) <= max(width, longest)


def test_plain_text_stays_as_it_is() -> None:
    for text in ("47 * 36 = 1692", "2**3 and 3**2", "a_b_c", "It costs $5 and $6.", "x < y > z", "a\\b", "*"):
        assert text_of(render_in([text])) == text + "\n"


@pytest.mark.parametrize(
    ("text", "style", "found"),
    [
        ("a *b c* d", "italic", "b c"),
        ("a **b** c", "bold", "b"),
        ("中**重点**文", "bold", "重点"),
        ("**a `*` b**", "bold", "a * b"),
        ("`a*b*c`", "code", "a*b*c"),
        ("``a`b``", "code", "a`b"),
        ("$a*b*c$", "italic", ""),
        ("\\*a*", "italic", ""),
        ("**never closed", "bold", ""),
        ("# Head", "heading", "Head"),
    ],
)
def test_styles(text: str, style: str, found: str) -> None:
    assert styled(text, style) == found


def test_words_appear_before_the_line_ends() -> None:
    stream = MarkdownStream(lambda: 40)
    assert text_of(stream.feed("The answer is ")) == "The answer is"
    assert text_of(stream.feed("42 and")) == " 42"


def test_code_is_not_touched() -> None:
    source = "```\n  **a**\n| b |\n# c\n````\n"
    assert text_of(render_in([source])) == "  **a**\n| b |\n# c\n"


def test_what_continues_a_list_stands_under_its_text() -> None:
    assert text_of(render_in(["- one two three four"], 12)) == "• one two\n  three four\n"


def test_a_table_in_a_narrow_terminal() -> None:
    lines = ["| name | what it does |", "|---|---|", "| a | something that needs several lines |"]
    shown = text_of(render(lines, 20)).splitlines()
    assert all(cell_len(line) <= 20 for line in shown)
    assert len({line.index("│") for line in shown if "│" in line}) == 1


def test_bars_that_are_no_table() -> None:
    assert text_of(render_in(["| just | bars\nnext"])) == "| just | bars\nnext\n"


def test_a_line_of_a_megabyte() -> None:
    for word in ("a", "*a ", "`a", "|", "中", "$x", "_*", "-"):
        cut = (word * 1000)[:1000]
        assert len(text_of(render_in([cut] * 100))) >= 40  # as it streams
    assert len(text_of(render_in(["*a" * 50_000], 79))) >= 10**5


@pytest.mark.parametrize(
    "hostile", ["\x1b[31mred", "\x9b2J", "\x07", "a\rb", "\u202egnp.exe", "\udc80", "\x1b]0;t\x07"]
)
def test_hostile_text_is_written_out(hostile: str) -> None:
    shown = escape(hostile)
    shown.encode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", shown)


def test_wrap_and_clip() -> None:
    assert wrap("aa bb cc", 5) == ["aa bb", "cc"]
    assert wrap("中文中文。", 5) == ["中文", "中", "文。"] or wrap("中文中文。", 5) == ["中文", "中文。"]
    assert clip("abcdef", 4) == "abc…" and clip("中文中", 5) == "中文…" and clip("ab", 4) == "ab"

"""Emphasis, code and mathematics within a line of Markdown, decided as early as the text allows.

What may be markup is held back until it is closed; at the end of the line, or where MAX_HELD characters hold no end of
it, it is shown as it is. Mathematics stays as it is written. Unlike in CommonMark, `*` between Latin letters or digits
is a multiplication sign.
"""

import re
from typing import NamedTuple

MAX_HELD = 200
ESCAPABLE = "\\`*_{}[]<>()#+-.!|~$"
EMPHASIS = {1: "italic", 2: "bold", 3: "bold italic"}
MATH_ENDS = {"(": "\\)", "[": "\\]"}
SPECIAL = {char: re.compile(rf"[{char}`\\$]") for char in "*_"}


class Piece(NamedTuple):
    """A text and how it looks: names of styles (`cli/terminal/screen.py`), separated by spaces."""

    text: str
    style: str = ""


def scan(text: str, before: str = " ", final: bool = False, style: str = "") -> tuple[list[Piece], int]:
    """The pieces of `text`, without line breaks, as far as is decided, and how many characters that are.

    before: the character that stands before `text`. final: the line ends behind it, so that all can be decided.
    """
    pieces: list[Piece] = []
    at = 0
    while at < len(text):
        window = text[at : at + MAX_HELD]
        decide = final or len(window) == MAX_HELD
        found = _construct(window, 0, text[at - 1] if at else before, decide, style)
        if found is None:
            break
        pieces += found[0]
        at += found[1]
    return _joined(pieces), at


def _construct(text: str, at: int, before: str, final: bool, style: str) -> tuple[list[Piece], int] | None:
    """What begins at `at` and where it ends; None while that is open."""
    match text[at]:
        case "`":
            return _code(text, at, final, style)
        case "\\":
            return _backslash(text, at, final, style)
        case "$":
            return _dollar(text, at, final, style)
        case "*" | "_":
            return _emphasis(text, at, before, final, style)
    end = at + 1
    while end < len(text) and text[end] not in "`\\$*_":
        end += 1
    return [Piece(text[at:end], style)], end


def _run(text: str, at: int) -> int:
    """How many times the character at `at` stands there."""
    end = at
    while end < len(text) and text[end] == text[at]:
        end += 1
    return end - at


def _code(text: str, at: int, final: bool, style: str) -> tuple[list[Piece], int] | None:
    count = _run(text, at)
    end = _find_run(text, at + count, "`", count)
    if end + count == len(text) and not final:
        return None  # the closing run may be longer yet
    if end >= 0:
        inner = text[at + count : end]
        return [Piece(inner.strip(" ") or inner, _with(style, "code"))], end + count
    return ([Piece(text[at : at + count], style)], at + count) if final else None


def _find_run(text: str, at: int, char: str, count: int) -> int:
    while (at := text.find(char, at)) >= 0:
        length = _run(text, at)
        if length == count:
            return at
        at += length
    return -1


def _backslash(text: str, at: int, final: bool, style: str) -> tuple[list[Piece], int] | None:
    if at + 1 == len(text):
        return ([Piece("\\", style)], at + 1) if final else None
    following = text[at + 1]
    if following in MATH_ENDS:
        end = text.find(MATH_ENDS[following], at + 2)
        if end >= 0:
            return [Piece(text[at : end + 2], style)], end + 2
        return ([Piece(text[at : at + 2], style)], at + 2) if final else None
    if following in ESCAPABLE:
        return [Piece(following, style)], at + 2
    return [Piece("\\", style)], at + 1


def _dollar(text: str, at: int, final: bool, style: str) -> tuple[list[Piece], int] | None:
    count = _run(text, at)
    start = at + count
    if start == len(text) and not final:
        return None
    end = text.find("$" * count, start)
    if end >= 0 and not text[start].isspace() and not text[end - 1].isspace():
        return [Piece(text[at : end + count], style)], end + count
    is_price = start < len(text) and (text[start].isdigit() or text[start].isspace())
    return ([Piece(text[at:start], style)], start) if final or is_price else None


def _emphasis(text: str, at: int, before: str, final: bool, style: str) -> tuple[list[Piece], int] | None:
    char, count = text[at], _run(text, at)
    start = at + count
    literal = [Piece(text[at:start], style)], start
    if start == len(text):
        return literal if final else None
    if not _can_open(char, count, before, text[start]):
        return literal
    end = _closing(text, start, char, count, final)
    if end is None:
        return literal if final else None
    inner, _ = scan(text[start:end], char, final=True, style=_with(style, EMPHASIS[count]))
    return inner, end + count


def _can_open(char: str, count: int, before: str, following: str) -> bool:
    if count > 3 or following.isspace():
        return False
    if char == "_":
        return not before.isalnum()
    return not (_is_latin(before) and _is_latin(following))


def _is_latin(char: str) -> bool:
    return char.isascii() and char.isalnum()


def _closing(text: str, at: int, char: str, count: int, final: bool) -> int | None:
    """Where the run that closes an emphasis begins, past code and mathematics."""
    while (found := SPECIAL[char].search(text, at)) is not None:
        at = found.start()
        if text[at] == char:
            length = _run(text, at)
            if at + length == len(text) and not final and length < count:
                return None
            following = text[at + length] if at + length < len(text) else " "
            if length == count and not text[at - 1].isspace() and not (char == "_" and following.isalnum()):
                return at
            at += length
        else:
            skipped = _construct(text, at, " ", True, "")
            at = skipped[1] if skipped else at + 1
    return None


def _with(style: str, added: str) -> str:
    return f"{style} {added}".strip()


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].style == piece.style:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.style)
        elif piece.text:
            joined.append(piece)
    return joined

"""Markdown as it streams. Text that was given out is never changed: so nothing flickers, and scrolling back is right.

Lines break where the model breaks them, and between words where the terminal ends. Tables are held back until they
are complete, because their columns depend on the last row. Mathematics and code are shown as they are written.
"""

import re
from collections.abc import Callable

from cli.terminal import table
from cli.terminal.inline import Piece, scan
from cli.terminal.wrap import Wrapper

HEADING = re.compile(r"(#{1,6}) +(.*)")
BULLET = re.compile(r"[-*+] ")
NUMBER = re.compile(r"\d{1,9}[.)] ")
RULE = re.compile(r"([-*_])( *\1){2,} *")
FENCE = re.compile(r"(`{3,}|~{3,})[^`]*")
# Beginnings of lines that may still become one of the above, a table, a quotation or a block of mathematics.
OPEN = re.compile(r" *(#{0,6}|[-*+_]|\d{1,9}[.)]?|([-*_])( *\2)+ *|`{1,2}|`{3,}[^`]*|~+.*|\$|\\|\|.*|>)?")
MATH_ENDS = {"$$": "$$", "\\[": "\\]"}
BULLETS = "•◦▪"
MAX_HEAD = 100_000  # characters of a line that is held back as a row of a table or the head of a code block


class MarkdownStream:
    """Takes text in pieces of any size, gives pieces to be written. width: tells the terminal's."""

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._wrapper = Wrapper(width)
        self._head: str | None = ""  # the line's beginning while its kind is open; None behind it
        self._held = ""  # of the line's body: markup that is not closed
        self._before = " "
        self._style = ""
        self._rows: list[str] = []  # of a table
        self._fence = ""  # what ends the block of code
        self._math = ""  # what ends the block of mathematics
        self._line = ""  # of mathematics, so far

    @property
    def waiting(self) -> str:
        """What is held back that takes long, for a line of status; empty if nothing is."""
        return f"a table, {len(self._rows)} rows so far" if self._rows else ""

    def feed(self, text: str) -> list[Piece]:
        """`text` may hold line breaks. It must be safe for the terminal already."""
        out: list[Piece] = []
        for number, part in enumerate(text.split("\n")):
            if number:
                out += self._end_line()
            if part:
                out += self._continue_line(part)
        return out

    def finish(self) -> list[Piece]:
        """What is held back, at the end of the text; ends the line if one is begun."""
        begun = self._head != "" or self._wrapper.column > 0
        out = self._end_line() if begun else []
        return [*out, *self._end_table()]

    def _continue_line(self, part: str) -> list[Piece]:
        if self._head is None:
            return self._body(part)
        self._head += part
        if self._is_open(self._head):
            return []
        head, self._head = self._head, None
        return [*self._end_table(), *self._begin(head)]

    def _is_open(self, head: str) -> bool:
        if len(head) > MAX_HEAD:
            return False
        if self._fence:
            return not head.strip() or self._fence.startswith(head.strip()) or self._closes_fence(head)
        return not self._math and OPEN.fullmatch(head) is not None

    def _end_line(self) -> list[Piece]:
        if self._head is None:
            out = [*self._body("", final=True), *self._wrapper.newline()]
            if self._math and self._math in self._line:
                self._math = ""
        else:
            out = self._whole_line(self._head)
        self._head, self._held, self._before, self._style, self._line = "", "", " ", "", ""
        return out

    def _whole_line(self, line: str) -> list[Piece]:
        """A line whose kind shows only now that it is complete."""
        stripped = line.strip()
        if self._fence:
            return self._code_line(line)
        if stripped.startswith("|"):
            self._rows.append(line)
            return []
        out = self._end_table()
        if (fence := FENCE.fullmatch(stripped)) is not None:
            self._fence = fence[1]
            return out
        if RULE.fullmatch(stripped):
            return [*out, Piece("─" * min(40, self._width()) + "\n", "dim")]
        if not stripped:
            return [*out, *self._wrapper.newline()]
        self._head = None
        return [*out, *self._begin(line), *self._end_line()]

    def _code_line(self, line: str) -> list[Piece]:
        if self._closes_fence(line):
            self._fence = ""
            return []
        return [Piece(line, "code"), Piece("\n")]

    def _closes_fence(self, line: str) -> bool:
        stripped = line.strip()
        return stripped.startswith(self._fence) and not stripped.strip(self._fence[0])

    def _end_table(self) -> list[Piece]:
        rows, self._rows = self._rows, []
        return table.render(rows, self._width()) if rows else []

    def _begin(self, head: str) -> list[Piece]:
        """The marker of a line whose kind is known, and its text so far."""
        stripped = head.lstrip(" ")
        indent = head[: len(head) - len(stripped)]
        if self._fence or self._math:
            return self._body(head)
        if (heading := HEADING.fullmatch(stripped)) is not None:
            self._style = "heading"
            return self._body(heading[2])
        if stripped[:2] in MATH_ENDS:
            self._math = MATH_ENDS[stripped[:2]]
            if self._math in stripped[2:]:
                self._math = ""
            return self._body(head)
        return self._begin_item(stripped, indent)

    def _begin_item(self, stripped: str, indent: str) -> list[Piece]:
        """Items of lists, quotations and plain lines: text that continues under its own beginning."""
        if BULLET.match(stripped):
            marker, rest = BULLETS[min(len(indent) // 2, 2)] + " ", stripped[2:]
        elif (number := NUMBER.match(stripped)) is not None:
            marker, rest = number[0], stripped[number.end() :]
        elif stripped.startswith(">"):
            marker, rest = "│ ", stripped[1:].removeprefix(" ")
            self._style = "quote"
        else:
            marker, rest = "", stripped
        first = Piece(indent + marker, "marker" if marker else "")
        out = self._wrapper.verbatim(first) if first.text else []
        self._wrapper.indent = min(self._wrapper.column, self._width() // 2)
        return [*out, *self._body(rest)]

    def _body(self, part: str, final: bool = False) -> list[Piece]:
        if self._fence:
            return self._wrapper.verbatim(Piece(part, "code")) if part else []
        if self._math:
            self._line = (self._line + part)[-MAX_HEAD:]
            return self._wrapper.verbatim(Piece(part)) if part else []
        text = self._held + part
        pieces, used = scan(text, self._before, final, self._style)
        self._held, self._before = text[used:], text[used - 1] if used else self._before
        return [shown for piece in pieces for shown in self._wrapper.feed(piece)]

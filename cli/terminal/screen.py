"""Writing to a terminal: styled text that stays, and below it a few rows that are drawn again in place.

Only rows that are surely on the screen are ever drawn again; what has scrolled off is never touched.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from cli.escape import escape
from cli.terminal.inline import Piece
from cli.terminal.wrap import clip, wrap

STYLES = {
    "bold": "1", "dim": "2", "italic": "3", "code": "36", "heading": "1;4", "quote": "3", "marker": "36",
    "warning": "33",
}  # fmt: skip
RESET = "\x1b[0m"
BEGIN_UPDATE, END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"  # terminals that know it show what is between at once


class Screen:
    """A terminal, or what stands in for one. is_fancy: whether it may get colours and rows that change."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = sys.stdout if file is None else file
        is_dumb = os.environ.get("TERM", "") in ("", "dumb") and os.name == "posix"
        self.is_fancy = self.file.isatty() and not os.environ.get("NO_COLOR") and not is_dumb
        self._rows = 0  # that are drawn again in place, the cursor being in the last
        self._drawn_width = 0

    @property
    def width(self) -> int:
        """Cells of a row that text may use; one is left free, where terminals differ in when they wrap."""
        return max(10, self._size().columns - 1)

    @property
    def height(self) -> int:
        return self._size().lines

    def _size(self) -> os.terminal_size:
        """Of the terminal itself; COLUMNS may be of another time."""
        try:
            return os.get_terminal_size(self.file.fileno())
        except (OSError, ValueError):
            return shutil.get_terminal_size()

    def write(self, pieces: Iterable[Piece]) -> None:
        """Write text that stays, whose control characters are escaped already. A status below it goes away first."""
        text = self._styled(pieces)
        if text:
            self._put(self._erased() + text)

    def line(self, text: str, style: str = "") -> None:
        """A line that stays, broken between words if it is long."""
        lines = wrap(escape(text), self.width) if self.is_fancy else [escape(text)]
        self.write([Piece("\n".join(lines), style), Piece("\n")])

    def status(self, lines: Sequence[str], style: str = "dim") -> None:
        """Show these rows below all that was written, in place of those shown before; none takes them away.

        Nothing on a terminal without colours. They must not be drawn while a line is begun.
        """
        if not self.is_fancy:
            return
        rows = [self._styled([Piece(clip(escape(line), self.width), style)]) for line in lines]
        drawn = self._erased() + "\r\n".join(rows)
        self._rows, self._drawn_width = len(rows), self.width
        self._put(f"{BEGIN_UPDATE}{drawn}{END_UPDATE}")

    def _erased(self) -> str:
        """What takes the status away. A terminal made narrower has broken its rows: these are left as they are."""
        rows, self._rows = self._rows, 0
        if not rows:
            return ""
        if self.width < self._drawn_width:
            return "\r\n"
        # Row by row: tmux keeps what is erased down to the screen's end, if that begins at the top.
        return "\r\x1b[2K" + "\x1b[1A\x1b[2K" * (rows - 1)

    def _styled(self, pieces: Iterable[Piece]) -> str:
        out: list[str] = []
        current = ""
        for text, style in pieces:
            style = style if self.is_fancy else ""
            if style != current:
                out.append((RESET if current else "") + _codes(style))
                current = style
            out.append(text)
        return "".join(out) + (RESET if current else "")

    def _put(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()


def _codes(style: str) -> str:
    return f"\x1b[{';'.join(STYLES[name] for name in style.split())}m" if style else ""

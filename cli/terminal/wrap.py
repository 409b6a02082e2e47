"""Breaking lines between words as text streams: what was written stays as it is.

A word is held back until it ends, because only then it is known whether it fits. Wide characters (Chinese, Japanese)
are words of their own, and take with them the punctuation that must not begin a line.
"""

from collections.abc import Callable

from rich.cells import cell_len

from cli.terminal.inline import Piece

TAB = "    "
JOINER, EMOJI_STYLE = "\u200d", "\ufe0f"
CLOSING = "、。，．：；！？）」』】〕〉》”’…—～"  # no line begins with these


class Wrapper:
    """Takes pieces, gives pieces with line breaks in them. width: tells the terminal's, which may change."""

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self.column = 0
        self.indent = 0  # of the lines that continue
        self._spaces, self._space_style = "", ""
        self._word: list[Piece] = []
        self._cells = 0

    def feed(self, piece: Piece) -> list[Piece]:
        """Text without line breaks."""
        out: list[Piece] = []
        for char in piece.text.replace("\t", TAB):
            if char == " ":
                out += self._flush()
                self._spaces, self._space_style = self._spaces + char, piece.style
                continue
            if self._begins_word(char):
                out += self._flush()
            self._word.append(Piece(char, piece.style))
            self._cells += self._added_cells(char)
            if self._cells > self._width():  # a word that fits into no line
                out += self._flush()
        return out

    def verbatim(self, piece: Piece) -> list[Piece]:
        """Text that the terminal may break where it likes, such as code."""
        out = self._flush()
        self.column += cell_len(piece.text)
        return [*out, piece]

    def newline(self) -> list[Piece]:
        """End the line; the next begins at the left."""
        out = self._flush()
        self.column, self.indent, self._spaces = 0, 0, ""
        return [*out, Piece("\n")]

    def finish(self) -> list[Piece]:
        """What is held back."""
        return self._flush()

    def _begins_word(self, char: str) -> bool:
        """Whether the line may be broken before `char`, which follows the word held back."""
        last = self._word[-1].text if self._word else ""
        if not last or char in CLOSING or last == JOINER or cell_len(char) == 0:
            return False
        return cell_len(char) == 2 or cell_len(last) == 2 or last in CLOSING

    def _added_cells(self, char: str) -> int:
        if len(self._word) > 1 and self._word[-2].text == JOINER:
            return 0
        return (
            1 if char == EMOJI_STYLE and len(self._word) > 1 and cell_len(self._word[-2].text) == 1 else cell_len(char)
        )

    def _flush(self) -> list[Piece]:
        if not self._word:
            return []
        out: list[Piece] = []
        if self.column + len(self._spaces) + self._cells > self._width() and self.column > self.indent:
            out.append(Piece("\n" + " " * self.indent))
            self.column = self.indent
        elif self._spaces:
            out.append(Piece(self._spaces, self._space_style))
            self.column += len(self._spaces)
        out += self._word
        self.column += self._cells
        self._word, self._cells, self._spaces = [], 0, ""
        return out


def wrap(text: str, width: int) -> list[str]:
    """The lines of a whole text, each of at most `width` cells but for words that are longer."""
    wrapper = Wrapper(lambda: width)
    pieces: list[Piece] = []
    for number, line in enumerate(text.split("\n")):
        pieces += [*(wrapper.newline() if number else []), *wrapper.feed(Piece(line))]
    return "".join(piece.text for piece in [*pieces, *wrapper.finish()]).split("\n")


def clip(text: str, width: int) -> str:
    """`text` cut to `width` cells."""
    if cell_len(text) <= width:
        return text
    kept, cells = [], 0
    for char in text:
        cells += cell_len(char)
        if cells > width - 1:
            break
        kept.append(char)
    return "".join(kept) + "…"

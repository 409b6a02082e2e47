"""A Markdown table in columns that fit the terminal."""

import re
from itertools import zip_longest

from rich.cells import cell_len

from cli.terminal.inline import Piece, scan
from cli.terminal.wrap import wrap

SEPARATOR = re.compile(r"\s*\|?(\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?\s*")
CELL_EDGE = re.compile(r"(?<!\\)\|")
MIN_COLUMN = 4
GAP = " │ "


def render(lines: list[str], width: int) -> list[Piece]:
    """`lines` as they were written, in `width` cells. Lines that are no table are shown as they are."""
    if len(lines) < 2 or not SEPARATOR.fullmatch(lines[1]):
        return [Piece("\n".join(lines) + "\n")]
    alignments = [_alignment(cell) for cell in split_row(lines[1])]
    rows = [[plain(cell) for cell in split_row(line)] for line in (lines[0], *lines[2:])]
    columns = max(len(row) for row in rows)
    rows = [row + [""] * (columns - len(row)) for row in rows]
    alignments += ["left"] * (columns - len(alignments))
    widths = fit([max(cell_len(row[i]) for row in rows) for i in range(columns)], width - len(GAP) * (columns - 1))
    rule = "─┼─".join("─" * cells for cells in widths)
    head = Piece(_row_text(rows[0], widths, alignments), "bold")
    body = Piece("".join(_row_text(row, widths, alignments) for row in rows[1:]))
    return [head, Piece(rule + "\n", "dim"), body]


def split_row(line: str) -> list[str]:
    """The cells of a line, without the bars at its ends."""
    inner = line.strip().removeprefix("|")
    inner = inner[:-1] if inner.endswith("|") and not inner.endswith("\\|") else inner
    return [cell.strip().replace("\\|", "|") for cell in CELL_EDGE.split(inner)]


def plain(cell: str) -> str:
    """A cell's text without its markup."""
    return "".join(piece.text for piece in scan(cell.replace("<br>", " "), final=True)[0])


def _alignment(cell: str) -> str:
    return "center" if cell[:1] == cell[-1:] == ":" else "right" if cell.endswith(":") else "left"


def fit(widths: list[int], room: int) -> list[int]:
    """Column widths of at most `room` cells together, the widest made narrower first."""
    fitted = [max(1, cells) for cells in widths]
    while sum(fitted) > room and max(fitted) > MIN_COLUMN:
        fitted[fitted.index(max(fitted))] -= 1
    return fitted


def _row_text(row: list[str], widths: list[int], alignments: list[str]) -> str:
    """A row, on as many lines as its highest cell needs."""
    cells = [wrap(cell, cells) for cell, cells in zip(row, widths, strict=True)]
    lines = []
    for parts in zip_longest(*cells, fillvalue=""):
        padded = [_pad(*given) for given in zip(parts, widths, alignments, strict=True)]
        lines.append(GAP.join(padded).rstrip() + "\n")
    return "".join(lines)


def _pad(text: str, cells: int, alignment: str) -> str:
    missing = max(0, cells - cell_len(text))
    left = {"left": 0, "right": missing, "center": missing // 2}[alignment]
    return " " * left + text + " " * (missing - left)

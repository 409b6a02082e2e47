"""The report of a store as a table. Imports neither torch nor numba."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli.escape import escape
from offload.sizes import format_size
from quant.report import Line, Report, read_report

WORST = 3  # tensors that are named


def show_report(folder: Path, console: Console) -> None:
    """What the store in `folder` holds of each component and what was lost; nothing if it has no report."""
    report = read_report(folder)
    if report is None or not report.tensors:
        return
    weighted = report.calibration is not None
    table = Table(box=None, pad_edge=False)
    table.add_column("stored")
    table.add_column("format")
    for heading in ("size", "bits a weight", "NMSE", *(["weighted"] if weighted else [])):
        table.add_column(heading, justify="right")
    for line in report.components:
        table.add_row(escape(line.name), escape(line.format), *_cells(line, weighted))
    console.print(table)
    for sentence in _sentences(report):
        console.print(sentence, soft_wrap=True)


def _cells(line: Line, weighted: bool) -> list[str]:
    errors = [line.nmse, line.weighted_nmse] if weighted else [line.nmse]
    shown = ["?" if error is None else f"{error:.2e}" for error in errors]
    return [format_size(line.nbytes), f"{line.bits_per_weight:.3g}", *shown]


def _sentences(report: Report) -> list[str]:
    worst = ", ".join(f"{escape(line.name)} ({escape(line.format)})" for line in report.tensors[:WORST])
    lines = [f"NMSE: squared error by squared weights. Most is lost of {worst}; report.json has every tensor."]
    made = report.calibration
    if made is not None:
        text = f"{made.tokens} tokens of {escape(made.name)}" if made.tokens else escape(made.name)
        lines.append(
            f"Columns count as {text} said; {made.rare} of {made.experts} experts saw too few tokens and got their "
            f"layer's figures, and {made.missing} matrices had none."
        )
    return lines

"""A report as a roofline: operations a second over operations a byte, under what the machine can do."""

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offload.benchmark.report import Point, Report
from quant.errors import Dsr1Error

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise Dsr1Error if a plot cannot be made or not be written to `path`: told before anything is measured."""
    if find_spec("matplotlib") is None:
        raise Dsr1Error("--plot needs matplotlib, which is not installed; run `pip install 'dsr1[plot]'`")
    if path.suffix.lower() not in SUFFIXES:
        raise Dsr1Error(f"{path} does not tell the plot's format; give a name that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise Dsr1Error(f"the plot cannot be written to {path}, as its folder does not exist; make the folder first")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise Dsr1Error(f"the plot cannot be written to {path}; give another name")


def place(point: Point) -> tuple[float, float]:
    """Operations for each byte of weights that is read, and billions of them a second."""
    return point.operations / point.layer.nbytes, point.operations_s / 1e9


def draw_roofline(report: Report, path: Path) -> None:
    """Write the plot in the format that the name of `path` ends in."""
    figure: Any = import_module("matplotlib.figure").Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    bandwidth, peak = report.limits.read.bytes_s / 1e9, report.limits.peak / 1e9
    ridge = peak / bandwidth
    intensities = [place(point)[0] for point in (*report.decode, *report.prefill)]
    ends = [min([*intensities, ridge]) / 2, ridge, max([*intensities, ridge]) * 2]
    axes.plot(ends, [min(peak, bandwidth * end) for end in ends], color="black", label="limit of this machine")
    for label, points in (("decode", report.decode), ("prefill", report.prefill)):
        if points:
            axes.plot(*zip(*map(place, points), strict=True), "o", label=label)
        for point in points:
            axes.annotate(str(point.tokens), place(point), textcoords="offset points", xytext=(5, -10))
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", ylabel="Gop/s")
    axes.set_title(f"a layer of {report.shape}, {report.format}, {report.threads} threads; labels are tokens")
    axes.legend()
    figure.savefig(path, dpi=150)

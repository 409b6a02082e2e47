"""`dsr1 quantize`: a published checkpoint becomes a store."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBar

from cli.compiling import show_compiling
from cli.escape import escape, say
from cli.importance import find_importance
from cli.report import show_report
from hybrid_rt.engine import use_threads
from hybrid_rt.models import resolve_checkpoint
from offload.sizes import format_size
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import StoreError
from quant.kernels.ahead import ENCODING_KERNELS, compile_ahead
from quant.progress import Progress
from quant.recipes import find_recipe
from quant.store import is_store

Show = Callable[[Progress], None]


def quantize(
    src: str,
    dst: str,
    recipe: str,
    jobs: int | None,
    as_json: bool,
    calibrate: Path | None = None,
    imatrix: Path | None = None,
) -> None:
    """Convert the model `src` into the folder `dst`, with `jobs` threads; told on standard error as it goes."""
    find_recipe(recipe)  # before the checkpoint is read
    source = resolve_checkpoint(src)
    if is_store(source):
        raise StoreError(f"{source} is a store already; give the published checkpoint that it was made from")
    checkpoint, folder = Checkpoint.open(source), Path(dst).expanduser()
    use_threads(jobs)
    compile_ahead(ENCODING_KERNELS, show_compiling)
    importance = find_importance(checkpoint, calibrate, imatrix)
    begin = time.perf_counter()
    try:
        with shown_progress() as show:
            manifest = convert(checkpoint, folder, recipe, show, importance)
    except KeyboardInterrupt:
        say("stopped; the same command continues where it was")
        raise
    seconds = time.perf_counter() - begin
    nbytes = sum(file.nbytes for file in manifest.files.values())
    if as_json:
        files = sorted(manifest.files)
        print(json.dumps({"store": str(folder), "recipe": recipe, "bytes": nbytes, "seconds": seconds, "files": files}))
    else:
        say(f"{folder}: {format_size(nbytes)}, recipe {recipe}, in {seconds:.0f} s")
        show_report(folder, Console(stderr=True, highlight=False, markup=False))


@contextmanager
def shown_progress() -> Iterator[Show]:
    """A bar on a terminal, once there is something to show; elsewhere a line for each file that is begun."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines().show
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True))
    bar = ProgressBar(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console)
    task = bar.add_task("", total=None)

    def show(step: Progress) -> None:
        bar.start()
        bar.update(task, description=escape(step.file), completed=step.done, total=step.total)

    try:
        yield show
    finally:
        bar.stop()


class Lines:
    """Progress for a log."""

    def __init__(self) -> None:
        self.file = ""

    def show(self, step: Progress) -> None:
        if step.file == self.file:
            return
        self.file = step.file
        say(f"{step.file}: at {format_size(step.done)} of {format_size(step.total)}")
        sys.stderr.flush()

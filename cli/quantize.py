"""`dsr1 quantize`: a published checkpoint becomes a store."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBar

from cli.compiling import show_compiling
from cli.escape import escape, say
from cli.importance import find_importance
from cli.report import show_report
from hybrid_rt.engine import use_threads
from hybrid_rt.models import resolve_checkpoint
from offload.sizes import format_size
from quant.checkpoint import Checkpoint
from quant.convert import Source, convert
from quant.errors import StoreError, UsageError
from quant.hub import HUB_ID
from quant.journal import check_target
from quant.kernels.ahead import ENCODING_KERNELS, compile_ahead
from quant.kernels.widen import widen
from quant.manifest import Manifest
from quant.progress import Fetching, Progress
from quant.recipes import find_recipe
from quant.store import is_store

Show = Callable[[Progress], None]


@dataclass(frozen=True)
class HubOptions:
    """revision: a branch, tag or commit. keep_source: leave what is downloaded in the Hub's cache."""

    revision: str | None = None
    keep_source: bool = False


def quantize(
    src: str,
    dst: str,
    recipe: str,
    jobs: int | None,
    as_json: bool,
    hub: HubOptions | None = None,
    calibrate: Path | None = None,
    imatrix: Path | None = None,
) -> None:
    """Convert the model `src` into the folder `dst`, with `jobs` threads; told on standard error as it goes."""
    folder = Path(dst).expanduser()
    find_recipe(recipe)  # before the checkpoint is read
    check_target(folder)  # and before anything is downloaded
    source = find_source(src, folder, hub or HubOptions(), calibrate is not None)
    use_threads(jobs)
    compile_ahead([*ENCODING_KERNELS, widen], show_compiling)
    begin = time.perf_counter()
    try:
        with shown_progress() as show:
            steps = Told(show)
            importance = find_importance(source.checkpoint, calibrate, imatrix, steps.note)
            manifest = convert(source, folder, recipe, steps.show, importance)
    except KeyboardInterrupt:
        say("stopped; the same command continues where it was")
        raise
    found = summary(src, source, folder, manifest, steps, time.perf_counter() - begin)
    if as_json:
        print(json.dumps(found))
    else:
        speed = f", {found['mb_s']:.0f} MB/s" if found["converted_bytes"] else ""
        say(f"{folder}: {format_size(found['bytes'])}, recipe {recipe}, in {found['seconds']:.0f} s{speed}")
        show_report(folder, Console(stderr=True, highlight=False, markup=False))


def find_source(src: str, store: Path, hub: HubOptions, calibrated: bool = False) -> Source:
    """What `src` names: a folder, a built-in name or a model on the Hub, which is asked now.

    calibrated: whether a text will run through it. Raises Dsr1Error.
    """
    if calibrated and is_on_hub(src):
        raise UsageError(
            f"--calibrate needs a layer's weights at once, and from the Hub they come shard by shard; download the "
            f"model first, with `hf download {src} --local-dir FOLDER`, and give FOLDER"
        )
    if (source := find_on_hub(src, store, hub)) is not None:
        return source
    folder = resolve_checkpoint(src)
    if is_store(folder):
        raise StoreError(f"{folder} is a store already; give the published checkpoint that it was made from")
    return Source.of(Checkpoint.open(folder))


def is_on_hub(src: str) -> bool:
    """Whether `src` is the id of a model that the Hub will be asked for."""
    from huggingface_hub import constants

    return bool(HUB_ID.fullmatch(src)) and not Path(src).expanduser().is_dir() and not constants.HF_HUB_OFFLINE


def find_on_hub(src: str, work: Path, hub: HubOptions) -> Source | None:
    """The model on the Hub that `src` names, to be converted in the folder `work`; None if it names none.

    Raises Dsr1Error if it cannot be had, or for options that are for such models only.
    """
    from huggingface_hub import constants

    if is_on_hub(src):
        from quant.hub_shards import hub_source

        return hub_source(src, hub.revision, work, hub.keep_source)
    if hub != HubOptions():
        where = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{src} is none"
        raise UsageError(f"--revision and --keep-source are for models on the Hub, and {where}; leave them out")
    return None


class Told:
    """The steps of a conversion on their way to who shows them: how much was there at first, and how much is."""

    def __init__(self, show: Show) -> None:
        self.there: int | None = None
        self._show, self._last = show, Progress("", 0, 0)

    @property
    def done(self) -> int:
        return self._last.done

    def show(self, step: Progress) -> None:
        self.there = step.done if self.there is None else self.there
        self._last = step
        self._show(step)

    def note(self, note: str) -> None:
        """Show what the next step waits for."""
        self._show(replace(self._last, note=note))


def summary(src: str, source: Source, folder: Path, manifest: Manifest, steps: Told, seconds: float) -> dict[str, Any]:
    """What --json prints. Bytes of the source are those of its weights; those converted are of this run."""
    converted = steps.done - (steps.there or 0)
    return {
        "store": str(folder),
        "source": src,
        "revision": source.shards.task.get("revision"),
        "recipe": manifest.formats.recipe,
        "bytes": sum(file.nbytes for file in manifest.files.values()),
        "files": sorted(manifest.files),
        "source_bytes": source.checkpoint.nbytes,
        "converted_bytes": converted,
        "seconds": seconds,
        "mb_s": converted / 1e6 / seconds,
    }


@contextmanager
def shown_progress() -> Iterator[Show]:
    """A bar on a terminal, once there is something to show; elsewhere a line for each file that is begun."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines().show
        return
    bars = Bars(console)
    try:
        yield bars.show
    finally:
        bars.stop()


class Bars:
    """A bar for the task, and one for what is downloaded meanwhile."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True))
        self._bars = ProgressBar(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console)
        self._task = self._bars.add_task("", total=None)
        self._fetching: tuple[str, TaskID] | None = None

    def show(self, step: Progress) -> None:
        self._bars.start()
        description = "\n  ".join(escape(name) for name in (step.file, step.tensor, step.note) if name)
        self._bars.update(self._task, description=description, completed=step.done, total=step.total)
        self._show_fetching(step.fetching)

    def stop(self) -> None:
        self._bars.stop()

    def _show_fetching(self, fetching: Fetching | None) -> None:
        if self._fetching is not None and (fetching is None or fetching.file != self._fetching[0]):
            self._bars.remove_task(self._fetching[1])
            self._fetching = None
        if fetching is None:
            return
        if self._fetching is None:
            self._fetching = (fetching.file, self._bars.add_task(f"downloading {escape(fetching.file)}"))
        self._bars.update(self._fetching[1], completed=fetching.done, total=fetching.total)


class Lines:
    """Progress for a log."""

    def __init__(self) -> None:
        self.file = self.note = ""

    def show(self, step: Progress) -> None:
        note = step.note.partition(":")[0]  # a line for each layer, not for each expert
        if note and note != self.note:
            self.note = note
            say(note)
        if step.file == self.file or note:
            return
        self.file = step.file
        say(f"{step.file}: at {format_size(step.done)} of {format_size(step.total)}")
        sys.stderr.flush()

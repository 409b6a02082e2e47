"""`dsr1 quantize --to`: a checkpoint or a store becomes a file or a folder that other programs load."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cli.compiling import show_compiling
from cli.escape import say
from cli.quantize import HubOptions, Show, find_on_hub, shown_progress
from hybrid_rt.engine import use_threads
from hybrid_rt.models import resolve_checkpoint
from offload.sizes import format_size
from quant.errors import UsageError
from quant.export import compressed_tensors, gguf_tensors
from quant.export.block_kernels import BLOCK_KERNELS
from quant.export.checkpoint import export_checkpoint
from quant.export.gguf import export_gguf, work_folder
from quant.export.report import Exported
from quant.export.source import Source, open_source
from quant.journal import check_target
from quant.kernels.ahead import compile_ahead
from quant.kernels.decode import decode
from quant.kernels.jit import Kernel
from quant.kernels.widen import widen
from quant.store import Store

Write = Callable[[Source, Path, Show], Exported]
GGUF, COMPRESSED_TENSORS = "gguf", "compressed-tensors"
TARGETS = (GGUF, COMPRESSED_TENSORS)


class Task(NamedTuple):
    """recipe: its name. work: the folder in which a path is written, checked. kernels: those that encode."""

    recipe: str
    work: Callable[[Path], Path]
    kernels: tuple[Kernel, ...]
    write: Write


def export(
    src: str, dst: str, target: str, recipe: str | None, jobs: int | None, as_json: bool, hub: HubOptions | None = None
) -> None:
    """Write the model `src` as `dst` for other programs, with `jobs` threads; told on standard error as it goes."""
    task, path = _task(target, recipe), Path(dst).expanduser()  # before the model is read
    source = find_source(src, task.work(path), hub or HubOptions())
    use_threads(jobs)
    compile_ahead([*task.kernels, decode if isinstance(source.model, Store) else widen], show_compiling)
    begin = time.perf_counter()
    try:
        with shown_progress() as show:
            exported = task.write(source, path, show)
    except KeyboardInterrupt:
        say("stopped; the same command continues where it was")
        raise
    _tell(source, path, target, task.recipe, exported, time.perf_counter() - begin, as_json)


def find_source(src: str, work: Path, hub: HubOptions) -> Source:
    """What `src` names: a folder, a built-in name, or a model on the Hub, to be written in `work`. Raises Dsr1Error."""
    found = find_on_hub(src, work, hub)
    return open_source(resolve_checkpoint(src)) if found is None else Source.of(found)


def _checked(folder: Path) -> Path:
    check_target(folder)
    return folder


def _task(target: str, recipe: str | None) -> Task:
    if target == GGUF:
        types = gguf_tensors.find_recipe(recipe or gguf_tensors.DEFAULT_RECIPE)
        return Task(
            types.name,
            work_folder,
            tuple(BLOCK_KERNELS[kind] for kind in gguf_tensors.block_types(types)),
            lambda source, path, show: export_gguf(source, path, types, show),
        )
    if target == COMPRESSED_TENSORS:
        packed = compressed_tensors.find_recipe(recipe or compressed_tensors.DEFAULT_RECIPE)
        return Task(
            packed.name,
            _checked,
            (BLOCK_KERNELS[packed.type],),
            lambda source, path, show: export_checkpoint(source, path, packed, show),
        )
    raise UsageError(f"--to {target} is not known; give store, {' or '.join(TARGETS)}")


def _tell(
    source: Source, path: Path, target: str, recipe: str, exported: Exported, seconds: float, as_json: bool
) -> None:
    nbytes, kind = sum(exported.files.values()), "store" if isinstance(source.model, Store) else "checkpoint"
    if as_json:
        counts = {"encoded": exported.encoded, "taken": exported.taken}
        told = {"path": str(path), "to": target, "recipe": recipe, "source": kind, "bytes": nbytes, "seconds": seconds}
        print(json.dumps({**told, **counts, "files": sorted(exported.files)}))
        return
    say(f"{path}: {format_size(nbytes)}, {target}, recipe {recipe}, in {seconds:.0f} s")
    if kind == "store" and exported.encoded:
        share = exported.encoded / (exported.encoded + exported.taken)
        say(
            f"{share:.0%} of the quantised weights were decoded from the store's formats and encoded anew; with the "
            "published checkpoint as the source less is lost"
        )

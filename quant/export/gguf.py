"""From a checkpoint or a store to one GGUF file, which llama.cpp loads.

It is written in a folder beside it, which holds the journal, too, and gets its name when it is whole; so the same call
continues what was stopped.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from quant.checkpoint import Checkpoint
from quant.convert import Source as ConvertSource
from quant.convert import check_space, write_files
from quant.errors import StoreError
from quant.export.block_types import ENCODED
from quant.export.encoder import BlockEncoder
from quant.export.gguf_fields import check_exportable, model_fields
from quant.export.gguf_file import GgufPlan
from quant.export.gguf_tensors import GgufRecipe, ModelTensor, model_tensors
from quant.export.gguf_tokenizer import tokenizer_fields
from quant.export.report import Exported, task_of
from quant.export.source import Model, Source, takes_over
from quant.export.targets import Place, export_pieces, whole
from quant.files import PART_SUFFIX, cannot_write, sync_folder
from quant.inventory import TensorSpec
from quant.journal import JOURNAL_NAME, conversion
from quant.pieces import pieces_by_shard
from quant.progress import Progress, ignore
from quant.store import Store

SUFFIX = ".gguf"


def export_gguf(
    source: Checkpoint | Store | Source | ConvertSource,
    path: Path,
    recipe: GgufRecipe,
    progress: Callable[[Progress], None] = ignore,
) -> Exported:
    """Write `source` as the file `path`, or finish what was begun. `progress` is called often.

    Raises StoreError if the file is there already or cannot be written, ConfigError and TokenizerError for a model that
    GGUF cannot express, CheckpointError for shards that cannot be had or read, or a weight that is not a number.
    """
    source, work = Source.of(source), work_folder(path)
    plan = _plan(source.model, path, recipe)
    kinds = {tensor.sources[0]: tensor.type for tensor in plan.tensors if tensor.part == "whole"}
    rows = source.rows({name: kind for first, kind in kinds.items() for name in _alike(source.model, first)})
    pieces = pieces_by_shard(rows, _places(source.model, path.name, plan), export_pieces)
    if not _is_finished(work, path):
        wanted = [shard for shard, its in pieces.items() if its]
        check_space("the file", work, [plan], source.shards.disk_bytes(wanted))
        with conversion(work, task_of(source, "gguf", recipe.name)) as journal:
            encoder = BlockEncoder(source.model.config)
            write_files(rows, source.shards, work, {path.name: plan}, pieces, journal, encoder, progress)
            source.shards.finish()
    _put_in_place(work, path)
    return Exported({path.name: plan.nbytes}, *_counts(source.model, plan))


def work_folder(path: Path) -> Path:
    """Where the file `path` is written. Raises StoreError for a path that cannot be written, or is there already."""
    folder, work = path.absolute().parent, path.with_name(path.name + PART_SUFFIX)
    if path.suffix != SUFFIX:
        raise StoreError(f"{path} does not end in {SUFFIX}; give the name of the file to write")
    if path.exists():
        with suppress(OSError):
            work.rmdir()  # a kill may have left it, empty
        raise StoreError(f"{path} exists; give another name, or delete it first")
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder; make it first, or give another place for the file")
    return work


def _plan(model: Model, path: Path, recipe: GgufRecipe) -> GgufPlan[ModelTensor]:
    check_exportable(model.config)
    fields = model_fields(model.config, path.name.removesuffix(SUFFIX), recipe)
    fields |= tokenizer_fields(model.folder, model.config.vocab_size)
    return GgufPlan.of(model_tensors(model.inventory, recipe), fields)


def _alike(model: Model, first: str) -> list[str]:
    """A matrix, or that matrix of all routed experts of a layer, by the name of the first one's."""
    before, is_expert, after = first.partition(".experts.0.")
    if not is_expert:
        return [first]
    return [f"{before}.experts.{expert}.{after}" for expert in range(model.config.n_routed_experts)]


def _places(model: Model, file: str, plan: GgufPlan[ModelTensor]) -> Iterator[Place]:
    for tensor, begin in zip(plan.tensors, plan.begins, strict=True):
        for name in tensor.sources:
            spec = model.inventory.by_name[name]
            if tensor.part == "whole":
                yield whole(spec, file, begin, tensor.type)
                begin += tensor.type.nbytes(spec.shape)
            else:
                yield _place_of_heads(spec, file, begin, tensor)


def _place_of_heads(spec: TensorSpec, file: str, begin: int, tensor: ModelTensor) -> Place:
    """A head's rows of wkv_b, and the bytes that its keys, or its values, take."""
    heads, *shape = tensor.shape
    return Place(
        spec, file, begin, tensor.type, spec.shape[0] // heads, tensor.type.nbytes((*shape,)), part=tensor.part
    )


def _is_finished(work: Path, path: Path) -> bool:
    """Whether an earlier run was killed just before it gave the file its name."""
    return (work / path.name).exists() and not (work / JOURNAL_NAME).exists()


def _put_in_place(work: Path, path: Path) -> None:
    try:
        (work / path.name).replace(path)
        sync_folder(path.absolute().parent)
        shutil.rmtree(work)
    except OSError as error:
        raise cannot_write(path, error) from None


def _counts(model: Model, plan: GgufPlan[ModelTensor]) -> tuple[int, int]:
    """Weights that are encoded anew, and those whose codes are taken over."""
    quantised = [tensor for tensor in plan.tensors if tensor.type in ENCODED]
    taken = sum(
        weights_of(tensor)
        for tensor in quantised
        if tensor.part == "whole" and takes_over(model, tensor.sources[0], tensor.type)
    )
    return sum(map(weights_of, quantised)) - taken, taken


def weights_of(tensor: ModelTensor) -> int:
    """How many values a tensor holds."""
    return tensor.nbytes // tensor.type.block_bytes * tensor.type.block

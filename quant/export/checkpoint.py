"""Writing a pack-quantized checkpoint: config.json comes last, so that a half-made folder is no model.

A journal lies in the folder meanwhile, so the same call continues what was stopped.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from quant.checkpoint import INDEX_NAME, Checkpoint
from quant.convert import Source as ConvertSource
from quant.convert import check_space, copied_files, write_files
from quant.export.block_types import BF16, F32
from quant.export.compressed_tensors import (
    CheckpointTensor,
    PackedRecipe,
    config_text,
    index_text,
    is_packed,
    plan_shards,
)
from quant.export.encoder import BlockEncoder
from quant.export.report import Exported, task_of
from quant.export.source import Model, Source, takes_over
from quant.export.targets import Part, Place, export_pieces, whole
from quant.files import new_file
from quant.journal import conversion
from quant.json_object import parse_json_object
from quant.pieces import pieces_by_shard
from quant.progress import Progress, ignore
from quant.safetensors_writer import FilePlan
from quant.store import CONFIG_NAME, Store

PARTS: Mapping[str, Part] = {"I32": "codes", "BF16": "scales", "I64": "shape"}  # of a packed matrix, by their types
PLAIN = {"BF16": BF16, "F32": F32}


def export_checkpoint(
    source: Checkpoint | Store | Source | ConvertSource,
    folder: Path,
    recipe: PackedRecipe,
    progress: Callable[[Progress], None] = ignore,
) -> Exported:
    """Write `source` into `folder`, which is new or empty, or finish what was begun there. `progress` is called often.

    Raises StoreError if the folder cannot take it, CheckpointError for shards that cannot be had or read, or a weight
    that is not a number.
    """
    source = Source.of(source)
    model, shards = source.model, source.shards
    plans = plan_shards(model.inventory, recipe)
    texts = {name: (model.folder / name).read_bytes() for name in copied_files(model.folder) if name != CONFIG_NAME}
    config = parse_json_object((model.folder / CONFIG_NAME).read_bytes())
    texts |= {INDEX_NAME: index_text(plans), CONFIG_NAME: config_text(config, model.inventory, recipe)}
    packed = [spec for spec in model.inventory.tensors if is_packed(spec, recipe)]
    rows = source.rows({spec.name: recipe.type for spec in packed})
    places = (place for name, plan in plans.items() for place in _places(name, plan, recipe))
    pieces = pieces_by_shard(rows, places, export_pieces)
    check_space("the checkpoint", folder, plans.values(), shards.disk_bytes([shard.path for shard in rows.shards]))
    with conversion(folder, task_of(source, "compressed-tensors", recipe.name)) as journal:
        write_files(rows, shards, folder, plans, pieces, journal, BlockEncoder(model.config), progress)
        for name, data in texts.items():
            with new_file(folder / name) as file:
                file.write(data)
        shards.finish()
    files = {name: plan.nbytes for name, plan in plans.items()} | {name: len(data) for name, data in texts.items()}
    return Exported(files, *_counts(model, recipe))


def _places(file: str, plan: FilePlan[CheckpointTensor], recipe: PackedRecipe) -> Iterator[Place]:
    for tensor, begin in zip(plan.tensors, plan.begins, strict=True):
        spec, begin = tensor.spec, begin + len(plan.head)
        assert spec is not None
        if is_packed(spec, recipe):
            part = PARTS[tensor.dtype]
            nbytes = tensor.nbytes if part == "shape" else tensor.nbytes // spec.shape[0]
            yield Place(spec, file, begin, recipe.type, 1, nbytes, part)
        else:
            yield whole(spec, file, begin, PLAIN[tensor.dtype])


def _counts(model: Model, recipe: PackedRecipe) -> tuple[int, int]:
    """Weights that are encoded anew, and those whose codes are taken over."""
    packed = [spec for spec in model.inventory.tensors if is_packed(spec, recipe)]
    taken = sum(spec.parameters for spec in packed if takes_over(model, spec.name, recipe.type))
    return sum(spec.parameters for spec in packed) - taken, taken

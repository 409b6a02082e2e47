"""Writing a pack-quantized checkpoint: shard by shard, config.json last, so that a half-made folder is no model."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from quant.convert import copied_files
from quant.errors import CheckpointError, StoreError
from quant.export.blocks import encode_blocks
from quant.export.compressed_tensors import (
    CheckpointTensor,
    PackedRecipe,
    config_text,
    index_text,
    is_packed,
    plan_shards,
    split_blocks,
)
from quant.export.report import Exported
from quant.export.source import Source, packed_rows, strip_ranges, strips
from quant.export.transfer import CODES_OF, takes_over, transfer
from quant.files import PART_SUFFIX, Report, ignore, new_file
from quant.inventory import TensorSpec
from quant.json_object import parse_json_object
from quant.progress import Meter, Progress
from quant.safetensors_writer import FilePlan, write_safetensors

CONFIG, INDEX = "config.json", "model.safetensors.index.json"


def export_checkpoint(
    source: Source, folder: Path, recipe: PackedRecipe, progress: Callable[[Progress], None] = lambda _: None
) -> Exported:
    """Write `source` into `folder`, which is new, empty, or was left by the same export. `progress` is called often.

    Raises StoreError if the folder cannot take it, CheckpointError for a weight that is not a number.
    """
    plans = plan_shards(source.inventory, recipe)
    copies = [name for name in copied_files(source.folder) if name != CONFIG]
    config = config_text(parse_json_object((source.folder / CONFIG).read_bytes()), source.inventory, recipe)
    _check_folder(folder, {*plans, *copies, INDEX})
    _check_space(folder, plans)
    folder.mkdir(parents=True, exist_ok=True)
    meter = Meter(sum(plan.nbytes for plan in plans.values()), progress)
    for name, plan in plans.items():
        weights = _Weights(source, recipe)
        write_safetensors(folder / name, plan, weights.values, meter.of(name))
    files = {name: plan.nbytes for name, plan in plans.items()}
    contents = {name: (source.folder / name).read_bytes() for name in copies}
    for name, data in {**contents, INDEX: index_text(plans), CONFIG: config}.items():
        _write(folder / name, data, ignore)
        files[name] = len(data)
    return Exported(files, *_counts(source, recipe))


def _check_folder(folder: Path, expected: set[str]) -> None:
    """Refuse a folder that holds anything else than what an interrupted export of this kind left there."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} exists and is a file; give a folder for the checkpoint")
    if any(path.name.removesuffix(PART_SUFFIX) not in expected for path in folder.iterdir()):
        raise StoreError(f"{folder} exists and is not empty; give a new or empty folder for the checkpoint")


def _check_space(folder: Path, plans: dict[str, FilePlan[CheckpointTensor]]) -> None:
    """Refuse before the first byte what would fill the disk."""
    there = folder if folder.exists() else next(parent for parent in folder.absolute().parents if parent.exists())
    begun = sum(path.stat().st_size for path in folder.glob("*.safetensors*"))
    needed = sum(plan.nbytes for plan in plans.values())
    short = needed - begun - shutil.disk_usage(there).free
    if short > 0:
        raise StoreError(
            f"the checkpoint needs {needed / 2**30:.1f} GiB, {short / 2**30:.1f} GiB more than the disk of {there} has "
            "free; free as much, or give a folder on another disk"
        )


def _write(path: Path, data: bytes, report: Report) -> None:
    with new_file(path, report) as file:
        file.write(data)


def _counts(source: Source, recipe: PackedRecipe) -> tuple[int, int]:
    """Weights that are encoded anew, and those whose codes are taken over."""
    packed = [spec for spec in source.inventory.tensors if is_packed(spec, recipe)]
    taken = sum(spec.parameters for spec in packed if takes_over(source, spec.name, recipe.type))
    return sum(spec.parameters for spec in packed) - taken, taken


class _Weights:
    """The values of tensors, asked for in the order of a shard: codes first, then the scales found with them."""

    def __init__(self, source: Source, recipe: PackedRecipe) -> None:
        self._source, self._recipe = source, recipe
        self._scales: list[torch.Tensor] = []  # of the matrix whose codes were written last

    def values(self, tensor: CheckpointTensor) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces."""
        spec = tensor.spec
        assert spec is not None
        if not is_packed(spec, self._recipe):
            dtype = torch.float32 if tensor.dtype == "F32" else torch.bfloat16
            for strip in strips(self._source.weight(spec.name)):
                yield _bytes_of(strip.to(dtype))
        elif tensor.dtype == "I64":
            yield np.array(spec.shape, "<i8").view(np.uint8).data
        elif tensor.dtype == "I32":
            self._scales = []
            for blocks in self._blocks(spec):
                codes, scales = split_blocks(blocks, self._recipe.type)
                self._scales.append(scales)
                yield codes.numpy().data
        else:
            yield from (scales.numpy().data for scales in self._scales)

    def _blocks(self, spec: TensorSpec) -> Iterator[torch.Tensor]:
        """A matrix, strip by strip, as blocks of a scale and codes: uint8."""
        kind = self._recipe.type
        if takes_over(self._source, spec.name, kind):
            weight = self._source.weight(spec.name, CODES_OF[kind].name)
            for start, stop in strip_ranges(weight.shape):
                yield torch.from_numpy(transfer(packed_rows(weight, start, stop), kind).reshape(-1))
            return
        for strip in strips(self._source.weight(spec.name)):
            try:
                yield encode_blocks(strip, kind)
            except ValueError as error:
                raise CheckpointError(
                    f"{self._source.folder}: tensor {spec.source!r} cannot be quantised ({error}); "
                    "download the model again"
                ) from None


def _bytes_of(values: torch.Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().reshape(-1).data

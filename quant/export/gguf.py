"""From a checkpoint or a store to one GGUF file, which llama.cpp loads: tensor by tensor, strip by strip."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from quant.errors import CheckpointError, StoreError
from quant.export.block_types import ENCODED
from quant.export.blocks import encode_blocks
from quant.export.gguf_fields import check_exportable, model_fields
from quant.export.gguf_file import GgufPlan, write_gguf
from quant.export.gguf_tensors import GgufRecipe, ModelTensor, model_tensors
from quant.export.gguf_tokenizer import tokenizer_fields
from quant.export.report import Exported
from quant.export.source import Source, packed_rows, rows_of, strip_ranges, strips
from quant.export.transfer import CODES_OF, takes_over, transfer
from quant.files import PART_SUFFIX, Report
from quant.formats import QuantTensor
from quant.progress import Meter, Progress

SUFFIX = ".gguf"


def export_gguf(
    source: Source, path: Path, recipe: GgufRecipe, progress: Callable[[Progress], None] = lambda _: None
) -> Exported:
    """Write `source` as the file `path`. `progress` is called often.

    Raises StoreError if the file is there already or cannot be written, ConfigError and TokenizerError for a model that
    GGUF cannot express, CheckpointError for a weight that is not a number.
    """
    check_exportable(source.config)
    _check_path(path)
    fields = model_fields(source.config, path.name.removesuffix(SUFFIX), recipe)
    fields |= tokenizer_fields(source.folder, source.config.vocab_size)
    plan = GgufPlan.of(model_tensors(source.inventory, recipe), fields)
    _check_space(path, plan.nbytes)
    meter = Meter(sum(tensor.nbytes for tensor in plan.tensors), progress)
    write_gguf(path, plan, lambda tensor: tensor_values(source, tensor), lambda tensor: _report(meter, tensor))
    quantised = [tensor for tensor in plan.tensors if tensor.type in ENCODED]
    taken = sum(weights_of(tensor) for tensor in quantised if is_transferred(source, tensor))
    return Exported({path.name: plan.nbytes}, sum(map(weights_of, quantised)) - taken, taken)


def _check_path(path: Path) -> None:
    if path.suffix != SUFFIX:
        raise StoreError(f"{path} does not end in {SUFFIX}; give the name of the file to write")
    if path.exists():
        raise StoreError(f"{path} exists; give another name, or delete it first")


def _check_space(path: Path, needed: int) -> None:
    """Refuse before the first byte what would fill the disk. A file left by an earlier run is written over."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder; make it first, or give another place for the file")
    left = path.with_name(path.name + PART_SUFFIX)
    begun = left.stat().st_size if left.exists() else 0
    short = needed - begun - shutil.disk_usage(folder).free
    if short > 0:
        raise StoreError(
            f"the file needs {needed / 2**30:.1f} GiB, {short / 2**30:.1f} GiB more than the disk of {folder} has "
            "free; free as much, or give a folder on another disk"
        )


def _report(meter: Meter, tensor: ModelTensor) -> Report:
    return meter.of("top" if tensor.layer is None else f"layer {tensor.layer}")


def weights_of(tensor: ModelTensor) -> int:
    """How many values a tensor holds."""
    return tensor.nbytes // tensor.type.block_bytes * tensor.type.block


def tensor_values(source: Source, tensor: ModelTensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in pieces."""
    if is_transferred(source, tensor):
        yield from _transferred(source, tensor)
        return
    for name in tensor.sources:
        for values in _values(source, source.weight(name), tensor):
            try:
                encoded = encode_blocks(values, tensor.type)
            except ValueError as error:
                raise CheckpointError(
                    f"{source.folder}: tensor {source.inventory.by_name[name].source!r} cannot be quantised ({error}); "
                    "download the model again"
                ) from None
            yield encoded.numpy().data


def _values(source: Source, weight: QuantTensor, tensor: ModelTensor) -> Iterator[torch.Tensor]:
    """The values of one of ours as the tensor holds them, in pieces of whole rows."""
    if tensor.part == "whole":
        yield from strips(weight)
        return
    nope, value = source.config.qk_nope_head_dim, source.config.v_head_dim
    for head in range(source.config.n_heads):
        start = head * (nope + value)
        if tensor.part == "keys":
            yield rows_of(weight, start, start + nope).T.contiguous()
        else:
            yield rows_of(weight, start + nope, start + nope + value).contiguous()


def is_transferred(source: Source, tensor: ModelTensor) -> bool:
    """Whether the source has codes that the tensor takes over."""
    return tensor.part == "whole" and takes_over(source, tensor.sources[0], tensor.type)


def _transferred(source: Source, tensor: ModelTensor) -> Iterator[memoryview]:
    for name in tensor.sources:
        weight = source.weight(name, CODES_OF[tensor.type].name)
        for start, stop in strip_ranges(weight.shape):
            yield transfer(packed_rows(weight, start, stop), tensor.type).reshape(-1).data

"""The weights of a model, row by row in float32, whether a checkpoint or a store holds them.

Memory holds a strip of rows, never a whole matrix of a large model.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from quant.checkpoint import Checkpoint
from quant.config import ModelConfig
from quant.dequantize import dequantize
from quant.formats import FP8_BLOCK, FP8_BLOCK_SIDE, QuantTensor
from quant.inventory import Inventory
from quant.packed import TILE_ROWS, PackedFormat
from quant.store import Store, is_store

STRIP_WEIGHTS = 1 << 22  # 16 MiB in float32
STRIP_ROWS = 128  # a strip is a multiple of this: scale blocks of FP8 and tiles of 16 rows stay whole


class Source(Protocol):
    """What is exported: a Checkpoint or a Store."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def inventory(self) -> Inventory: ...
    def representations(self, name: str) -> tuple[str, ...]: ...
    def weight(self, name: str, representation: str | None = None) -> QuantTensor: ...


def open_source(folder: Path) -> Source:
    """The checkpoint or store in `folder`. Raises Dsr1Error if it is neither, or damaged."""
    return Store.open(folder) if is_store(folder) else Checkpoint.open(folder)


def strips(weight: QuantTensor) -> Iterator[torch.Tensor]:
    """The values of a vector, or of whole rows of a matrix: float32 [rows, K]."""
    if len(weight.shape) == 1:
        yield weight.dequantize(torch.float32)
        return
    for start, stop in strip_ranges(weight.shape):
        yield rows_of(weight, start, stop)


def strip_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First and last row, it not included, of each strip of a matrix."""
    step = max(STRIP_WEIGHTS // shape[1] // STRIP_ROWS, 1) * STRIP_ROWS
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def rows_of(weight: QuantTensor, start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop` of a matrix in any format: float32, contiguous."""
    if isinstance(weight.format, PackedFormat):
        first = start // TILE_ROWS * TILE_ROWS
        return dequantize(packed_rows(weight, first, stop))[start - first :]
    if weight.format is not FP8_BLOCK or weight.scale is None:
        return weight.data[start:stop].to(torch.float32)
    first = start // FP8_BLOCK_SIDE * FP8_BLOCK_SIDE
    scale = weight.scale[first // FP8_BLOCK_SIDE : -(-stop // FP8_BLOCK_SIDE)]
    part = QuantTensor(weight.format, (stop - first, weight.shape[1]), weight.data[first:stop], scale)
    return part.dequantize(torch.float32)[start - first :]


def packed_rows(weight: QuantTensor, start: int, stop: int) -> QuantTensor:
    """Rows of a packed matrix, as a view. start: a multiple of 16."""
    assert isinstance(weight.format, PackedFormat)
    tile_bytes = weight.format.tile_bytes(weight.shape)
    data = weight.data[start // TILE_ROWS * tile_bytes : -(-stop // TILE_ROWS) * tile_bytes]
    return QuantTensor(weight.format, (stop - start, weight.shape[1]), data)

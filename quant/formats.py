"""A quantised tensor is one value: its format, its shape, its data and its scales."""

from dataclasses import dataclass

import torch

from quant.packed import PackedFormat
from quant.packing import decode

FP8_BLOCK_SIDE = 128


@dataclass(frozen=True)
class Format:
    """How the values of one tensor are stored.

    `block` is the (rows, columns) that share one scale; None where values need no scale.
    """

    name: str
    bits: int
    dtype: torch.dtype
    block: tuple[int, int] | None = None

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of the scales of a matrix of `shape`; the last block of a row or column may be ragged."""
        if self.block is None:
            return None
        return tuple(-(-size // side) for size, side in zip(shape, self.block, strict=True))


BF16 = Format("bf16", 16, torch.bfloat16)
F32 = Format("f32", 32, torch.float32)
FP8_BLOCK = Format("fp8_block", 8, torch.float8_e4m3fn, (FP8_BLOCK_SIDE, FP8_BLOCK_SIDE))

FORMATS = {fmt.name: fmt for fmt in (BF16, F32, FP8_BLOCK)}


@dataclass(frozen=True)
class QuantTensor:
    """One weight as it is stored.

    data: usually a view of a mapped file. In a plain format: `shape`, of its dtype; scale: float32 of
    `format.scale_shape(shape)`, each the multiplier of one block, or None. In a packed one: uint8
    [format.nbytes(shape)], scales within.
    """

    format: Format | PackedFormat
    shape: tuple[int, ...]
    data: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the data and of the scales."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The plain values, computed in float32 and rounded once to `dtype`. Shape: `shape`."""
        if isinstance(self.format, PackedFormat):
            return torch.from_numpy(decode(self.data.numpy(), self.format, self.shape)).to(dtype)
        if self.scale is None:
            return self.data.to(dtype)
        return (self.data.float() * spread_blocks(self.scale, self.shape, self.format)).to(dtype)


def spread_blocks(scale: torch.Tensor, shape: tuple[int, ...], fmt: Format) -> torch.Tensor:
    """Repeat each block's scale over the elements of a matrix of `shape`."""
    assert fmt.block is not None
    rows, columns = fmt.block
    return scale.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]

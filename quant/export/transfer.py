"""Packed weights of a store in another program's blocks by taking their codes over, where both have the same kind.

`fast` has a scale for 32 weights and codes -8 .. 7, as Q4_0 and groups of 32 of compressed-tensors have; `q8` a scale
for 128 weights and codes -127 .. 127, as Q8_0 has for 32. Only the scale is rounded, to half precision or bfloat16,
where that does not hold it: docs/export.md says when.
"""

import numpy as np
from numpy.typing import NDArray

from quant.export.block_reference import nearest_half
from quant.export.block_types import INT4_32, Q4_0, Q8_0, BlockType
from quant.formats import QuantTensor
from quant.packed import BLOCK_K, FAST, Q8, PackedFormat
from quant.packing import Codes, bf16_of_float, float_of_bf16, unpack

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
GROUP = 32
CODES_OF: dict[BlockType, PackedFormat] = {Q4_0: FAST, INT4_32: FAST, Q8_0: Q8}


def transfer(weight: QuantTensor, kind: BlockType) -> Bytes:
    """A matrix [N, K] in the packed format CODES_OF[kind] as blocks: uint8 [N, bytes of a row]."""
    assert weight.format is CODES_OF[kind]
    rows, columns = weight.shape
    quantised = unpack(weight.data.numpy(), weight.format, weight.shape)
    scales = group_scales(quantised, weight.format)[:rows, : columns // GROUP]
    codes = quantised.codes[:rows, :columns].reshape(rows, -1, GROUP)
    return np.concatenate([_SCALE_BYTES[kind](scales), _CODE_BYTES[kind](codes)], axis=2).reshape(rows, -1)


def group_scales(quantised: Codes, fmt: PackedFormat) -> Floats:
    """What the levels of 32 columns are multiplied by, exactly: float32 [rows, columns / 32], padding included."""
    d = float_of_bf16(quantised.block_scales).repeat(BLOCK_K // GROUP, axis=1)
    return d if fmt.integers is None else d * quantised.integers.astype(np.float32)


def _half(scales: Floats) -> Bytes:
    return nearest_half(scales).astype("<f2")[..., None].view(np.uint8)


def _bf16(scales: Floats) -> Bytes:
    return bf16_of_float(scales).astype("<u2")[..., None].view(np.uint8)


_SCALE_BYTES = {Q4_0: _half, Q8_0: _half, INT4_32: _bf16}
_CODE_BYTES = {
    Q4_0: lambda codes: codes[..., :16] | codes[..., 16:] << np.uint8(4),
    Q8_0: lambda codes: codes - np.uint8(128),
    INT4_32: lambda codes: codes[..., 0::2] | codes[..., 1::2] << np.uint8(4),
}

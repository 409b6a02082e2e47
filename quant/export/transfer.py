"""Packed weights of a store into GGUF blocks by taking their codes over, where both have codes of the same kind.

`fast` becomes Q4_0: both are a scale times -8 .. 7 for 32 weights. `q8` becomes Q8_0: a scale times -127 .. 127, which
128 weights share in the one and 32 in the other. Only the scale is rounded, to half precision, where that does not
hold it: docs/export.md says when.
"""

import numpy as np
from numpy.typing import NDArray

from quant.export.block_reference import nearest_half
from quant.export.block_types import Q4_0, Q8_0, BlockType
from quant.formats import QuantTensor
from quant.packed import BLOCK_K, FAST, Q8, PackedFormat
from quant.packing import Codes, float_of_bf16, unpack

Bytes = NDArray[np.uint8]
TRANSFERS = {Q4_0: FAST, Q8_0: Q8}


def source_format(kind: BlockType) -> PackedFormat | None:
    """The packed format whose codes `kind` takes over."""
    return TRANSFERS.get(kind)


def transfer(weight: QuantTensor, kind: BlockType) -> Bytes:
    """A matrix [N, K] in the packed format of `kind` as its blocks: uint8 [N, bytes of a row]."""
    assert weight.format is TRANSFERS[kind]
    rows, columns = weight.shape
    quantised = unpack(weight.data.numpy(), weight.format, weight.shape)
    scales = nearest_half(group_scales(quantised, weight.format))[:rows, : columns // kind.block]
    codes = quantised.codes[:rows, :columns].reshape(rows, -1, kind.block)
    if kind is Q4_0:
        values = codes[..., :16] | codes[..., 16:] << np.uint8(4)
    else:
        values = codes - np.uint8(128)
    return np.concatenate([scales.astype("<f2")[..., None].view(np.uint8), values], axis=2).reshape(rows, -1)


def group_scales(quantised: Codes, fmt: PackedFormat) -> NDArray[np.float32]:
    """What the levels of 32 columns are multiplied by, exactly: float32 [rows, columns / 32], padding included."""
    d = float_of_bf16(quantised.block_scales)
    per_block = BLOCK_K // 32
    if fmt.integers is None:
        return d.repeat(per_block, axis=1)
    return d.repeat(BLOCK_K // fmt.group, axis=1) * quantised.integers.astype(np.float32)

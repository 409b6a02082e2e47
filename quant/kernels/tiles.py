"""Rows of a weight matrix, opened for multiplication with a group of tokens."""

from typing import NamedTuple

import numba
import numpy as np

from quant.formats import FP8_BLOCK_SIDE
from quant.kernels.jit import inner, shared
from quant.kernels.vector import (
    BF16_CODE,
    F32_CODE,
    FP8_CODE,
    LANES,
    ROW_TILE,
    TOKEN_TILE,
    make_decode,
    make_dot,
    pointer,
)

BLOCK_ROWS = 32  # rows decoded together; divides the 128 rows of a scale block. 32 x 7168 float32 fit a 1 MiB L2
FUSED_TOKENS = 4  # up to here weights are decoded on the way; beyond, once into a buffer
RESULT_FLOATS = ROW_TILE * TOKEN_TILE

_dot_f32, _dot_bf16, _dot_fp8 = (make_dot(code, 1) for code in (F32_CODE, BF16_CODE, FP8_CODE))
_dot_f32_many, _dot_bf16_many, _dot_fp8_many = (make_dot(code, TOKEN_TILE) for code in (F32_CODE, BF16_CODE, FP8_CODE))
_decode_bf16, _decode_fp8 = (make_decode(code) for code in (BF16_CODE, FP8_CODE))


class Rows(NamedTuple):
    """`size` weight rows of `k` values at `address`, `stride` bytes apart, all in one row of scale blocks."""

    code: int
    address: int
    stride: int
    scale: int
    size: int
    k: int


@inner
def floats(address, shape):  # type: ignore[no-untyped-def]
    """The float32 array of `shape` at `address`."""
    return numba.carray(pointer(address), shape, np.float32)


@inner
def doubles(address, shape):  # type: ignore[no-untyped-def]
    """The float64 array of `shape` at `address`."""
    return numba.carray(pointer(address), shape, np.float64)


@inner
def words(address, shape):  # type: ignore[no-untyped-def]
    """The int32 array of `shape` at `address`."""
    return numba.carray(pointer(address), shape, np.int32)


@inner
def integers(address, shape):  # type: ignore[no-untyped-def]
    """The int64 array of `shape` at `address`."""
    return numba.carray(pointer(address), shape, np.int64)


@inner
def open_rows(code, weight, scale, first, count, k, tokens, decoded):  # type: ignore[no-untyped-def]
    """Rows `first` to `first + count` of a matrix, decoded to float32 at `decoded` if `tokens` make that worth it."""
    stride = k * (4 >> code)
    address = weight + first * stride
    if code == FP8_CODE:
        scale += first // FP8_BLOCK_SIDE * ((k + FP8_BLOCK_SIDE - 1) // FP8_BLOCK_SIDE) * 4
    if code == F32_CODE or tokens <= FUSED_TOKENS:
        return Rows(code, address, stride, scale, count, k)
    decoded_stride = padded(k) * 4
    for row in range(count):
        source, target = address + row * stride, decoded + row * decoded_stride
        if code == FP8_CODE:
            _decode_fp8(source, scale, k, target)
        else:
            _decode_bf16(source, scale, k, target)
    return Rows(F32_CODE, decoded, decoded_stride, 0, count, k)


@shared
def padded(k: int) -> int:
    """k rounded up to whole vectors."""
    return (k + LANES - 1) // LANES * LANES


@inner
def dot_tile(rows, row, tokens, inputs, result):  # type: ignore[no-untyped-def]
    """result [TOKEN_TILE, ROW_TILE] float32 = up to 4 `tokens` (addresses `inputs`) times rows `row` to `row + 4`.

    Rows and tokens beyond the last repeat it: their results are there and mean nothing.
    """
    last = rows.size - 1
    weights = (
        rows.address + row * rows.stride,
        rows.address + min(row + 1, last) * rows.stride,
        rows.address + min(row + 2, last) * rows.stride,
        rows.address + min(row + 3, last) * rows.stride,
    )
    if tokens == 1:
        one = (inputs[0],)
        if rows.code == FP8_CODE:
            _dot_fp8(weights, one, rows.scale, rows.k, result)
        elif rows.code == BF16_CODE:
            _dot_bf16(weights, one, rows.scale, rows.k, result)
        else:
            _dot_f32(weights, one, rows.scale, rows.k, result)
    elif rows.code == FP8_CODE:
        _dot_fp8_many(weights, inputs, rows.scale, rows.k, result)
    elif rows.code == BF16_CODE:
        _dot_bf16_many(weights, inputs, rows.scale, rows.k, result)
    else:
        _dot_f32_many(weights, inputs, rows.scale, rows.k, result)


@inner
def strided_inputs(base, stride, tokens):  # type: ignore[no-untyped-def]
    """Addresses of up to 4 inputs that lie `stride` bytes apart."""
    last = tokens - 1
    return (base, base + min(1, last) * stride, base + min(2, last) * stride, base + min(3, last) * stride)


@inner
def share(blocks, part, parts):  # type: ignore[no-untyped-def]
    """The range of blocks that one of `parts` threads computes."""
    return blocks * part // parts, blocks * (part + 1) // parts

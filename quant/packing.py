"""Codes and scales of a packed format as bytes, and back: the layout of docs/formats.md in NumPy.

Shapes: a matrix [N, K] is padded to whole blocks of 16 rows by 128 columns, [rows, columns]; G = columns / group and
B = columns / 128.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.packed import (
    BLOCK_K,
    INTEGER_STEP,
    LINE,
    LOWEST_INTEGER,
    TILE_ROWS,
    PackedFormat,
    blocks_per_row,
    tiles,
)

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]


class Codes(NamedTuple):
    """A quantised matrix before packing, padded to whole blocks.

    codes: uint8 [rows, columns]. integers: what each group's d is multiplied by, int8 [rows, G]; ones in a format
    without them. block_scales: bits of each block row's d, a bfloat16, uint16 [rows, B].
    """

    codes: Bytes
    integers: NDArray[np.int8]
    block_scales: NDArray[np.uint16]


def padded_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[rows, columns] of the whole blocks that hold a matrix of `shape`."""
    return tiles(shape) * TILE_ROWS, blocks_per_row(shape) * BLOCK_K


def pack(quantised: Codes, fmt: PackedFormat) -> Bytes:
    """The blocks, row tiles outermost: uint8 [bytes]."""
    rows, columns = quantised.codes.shape
    n_tiles, n_blocks = rows // TILE_ROWS, columns // BLOCK_K
    blocks = np.empty((n_tiles, n_blocks, fmt.block_bytes), np.uint8)
    blocks[:, :, : fmt.header_bytes] = _pack_header(quantised, fmt).reshape(n_tiles, n_blocks, -1)
    codes = quantised.codes.reshape(n_tiles, TILE_ROWS, n_blocks, BLOCK_K)
    quads: Bytes
    if fmt.bits == 8:
        quads = codes.reshape(n_tiles, TILE_ROWS, n_blocks, BLOCK_K // 4, 4)
    else:
        halves = codes.reshape(n_tiles, TILE_ROWS, n_blocks, BLOCK_K // 8, 2, 4)
        quads = halves[..., 0, :] | halves[..., 1, :] << np.uint8(4)
    blocks[:, :, fmt.header_bytes :] = quads.transpose(0, 2, 3, 1, 4).reshape(n_tiles, n_blocks, -1)
    return blocks.reshape(-1)


def _pack_header(quantised: Codes, fmt: PackedFormat) -> Bytes:
    """The header lines: a uint32 a row in each. [tiles, blocks, lines, bytes of a line]."""
    rows, n_blocks = quantised.block_scales.shape
    words = quantised.block_scales.astype(np.uint32)[:, :, None].repeat(fmt.header_bytes // LINE, axis=2) << 16
    if fmt.integers is not None:
        above_lowest = quantised.integers.reshape(rows, n_blocks, -1) - np.int8(LOWEST_INTEGER[fmt.integers])
        stored: Words = (above_lowest // np.int8(INTEGER_STEP[fmt.integers])).astype(np.uint32)
        if fmt.integers == "i6":
            words[:, :, 0] |= _join_bits(stored >> np.uint32(4), 2)
            words[:, :, 1] = 0
        words[:, :, -1] |= _join_bits(stored & np.uint32(15), 4)
    lines = words.reshape(-1, TILE_ROWS, n_blocks, words.shape[2]).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(lines.astype("<u4")).view(np.uint8)


def _join_bits(values: Words, bits: int) -> Words:
    """The last axis as one integer, `bits` each, from the lowest on."""
    shifts = np.arange(0, bits * values.shape[-1], bits, dtype=np.uint32)
    joined: Words = np.bitwise_or.reduce(values << shifts, axis=-1)
    return joined


def unpack(data: Bytes, fmt: PackedFormat, shape: tuple[int, ...]) -> Codes:
    """The reverse of `pack`, for a matrix of `shape` [N, K]; still padded."""
    rows, columns = padded_shape(shape)
    n_tiles, n_blocks = rows // TILE_ROWS, columns // BLOCK_K
    blocks = data.reshape(n_tiles, n_blocks, fmt.block_bytes)
    stored = blocks[:, :, fmt.header_bytes :].reshape(n_tiles, n_blocks, -1, TILE_ROWS, 4).transpose(0, 3, 1, 2, 4)
    codes = stored if fmt.bits == 8 else np.stack([stored & 15, stored >> 4], axis=4)
    header = np.ascontiguousarray(blocks[:, :, : fmt.header_bytes]).view("<u4")
    lines = header.reshape(n_tiles, n_blocks, -1, TILE_ROWS).transpose(2, 0, 3, 1)
    words = lines.reshape(-1, rows, n_blocks).astype(np.uint32, order="C")  # [lines, rows, B]
    integers = _unpack_integers(words, fmt).reshape(rows, -1)
    return Codes(np.ascontiguousarray(codes.reshape(rows, columns)), integers, (words[0] >> 16).astype(np.uint16))


def _unpack_integers(words: Words, fmt: PackedFormat) -> NDArray[np.int8]:
    """int8 [rows, B, groups of a block] from the header's words [lines, rows, B]."""
    if fmt.integers is None:
        return np.ones((*words.shape[1:], 1), np.int8)
    groups = np.arange(BLOCK_K // fmt.group, dtype=np.uint32)
    stored = words[-1, :, :, None] >> 4 * groups & 15
    if fmt.integers == "i6":
        stored |= (words[0, :, :, None] >> 2 * groups & 3) << 4
    return stored.astype(np.int8) * np.int8(INTEGER_STEP[fmt.integers]) + np.int8(LOWEST_INTEGER[fmt.integers])


def levels_of(codes: Bytes, fmt: PackedFormat) -> NDArray[np.int16]:
    """What codes stand for, before s and d."""
    if fmt.levels is not None:
        return np.array(fmt.levels, np.int16)[codes]
    return codes.astype(np.int16) - np.int16(fmt.zero)


def whole_weights(quantised: Codes, fmt: PackedFormat) -> NDArray[np.int16]:
    """The integer part s × level(code) of each weight, what its row's d is multiplied by: int16 [rows, columns]."""
    return levels_of(quantised.codes, fmt) * quantised.integers.repeat(fmt.group, axis=1)


def decode(data: Bytes, fmt: PackedFormat, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The values of a packed matrix: float32 [N, K]. Exact: 8 bits of mantissa times at most 12."""
    quantised = unpack(data, fmt, shape)
    d = float_of_bf16(quantised.block_scales).repeat(BLOCK_K, axis=1)
    values = whole_weights(quantised, fmt).astype(np.float32) * d
    return np.ascontiguousarray(values[: shape[0], : shape[1]])


def float_of_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_of_float(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, halves to even. Finite values only."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

"""Codes and scales of a packed format as bytes, and back: the layout of docs/formats.md in NumPy.

Shapes: a matrix [N, K] is padded to whole blocks of 16 rows by 128 columns, [rows, columns]; G = columns / group.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.packed import BLOCK_K, HEADER_BYTES, TILE_ROWS, PackedFormat, blocks_per_row, tiles

Bytes = NDArray[np.uint8]


class Codes(NamedTuple):
    """A quantised matrix before packing, padded to whole blocks.

    codes: uint8 [rows, columns]. scales: for "bf16" the bits of each group's scale, uint16 [rows, G]; for "i6xbf16"
    each group's integer -32..31, int8 [rows, G]. block_scales: for "i6xbf16" bits, uint16 [rows, columns / 128].
    """

    codes: Bytes
    scales: NDArray[np.uint16] | NDArray[np.int8]
    block_scales: NDArray[np.uint16] | None = None


def padded_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[rows, columns] of the whole blocks that hold a matrix of `shape`."""
    return tiles(shape) * TILE_ROWS, blocks_per_row(shape) * BLOCK_K


def pack(quantised: Codes, fmt: PackedFormat) -> Bytes:
    """The blocks, row tiles outermost: uint8 [bytes]."""
    rows, columns = quantised.codes.shape
    n_tiles, n_blocks = rows // TILE_ROWS, columns // BLOCK_K
    blocks = np.empty((n_tiles, n_blocks, fmt.block_bytes), np.uint8)
    blocks[:, :, :HEADER_BYTES] = _pack_header(quantised, fmt, n_tiles, n_blocks)
    codes = quantised.codes.reshape(n_tiles, TILE_ROWS, n_blocks, BLOCK_K)
    quads: Bytes
    if fmt.bits == 8:
        quads = codes.reshape(n_tiles, TILE_ROWS, n_blocks, BLOCK_K // 4, 4)
    else:
        halves = codes.reshape(n_tiles, TILE_ROWS, n_blocks, BLOCK_K // 8, 2, 4)
        quads = halves[..., 0, :] | halves[..., 1, :] << np.uint8(4)
    blocks[:, :, HEADER_BYTES:] = quads.transpose(0, 2, 3, 1, 4).reshape(n_tiles, n_blocks, -1)
    return blocks.reshape(-1)


def _pack_header(quantised: Codes, fmt: PackedFormat, n_tiles: int, n_blocks: int) -> Bytes:
    """uint8 [tiles, blocks, 128]."""
    per_block = BLOCK_K // fmt.group
    scales = quantised.scales.reshape(n_tiles, TILE_ROWS, n_blocks, per_block).transpose(0, 2, 3, 1)
    if fmt.scale == "bf16":
        return np.ascontiguousarray(scales).view(np.uint8).reshape(n_tiles, n_blocks, HEADER_BYTES)
    assert quantised.block_scales is not None
    block_scales = quantised.block_scales.reshape(n_tiles, TILE_ROWS, n_blocks).transpose(0, 2, 1)
    biased = (scales.astype(np.int16) + 32).astype(np.uint8)  # [tiles, blocks, 8, 16]
    pairs = biased.reshape(n_tiles, n_blocks, 4, 2, TILE_ROWS) & 15
    low = pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4
    fours = biased.reshape(n_tiles, n_blocks, 2, 4, TILE_ROWS) >> 4
    high = fours[:, :, :, 0] | fours[:, :, :, 1] << 2 | fours[:, :, :, 2] << 4 | fours[:, :, :, 3] << 6
    whole = (n_tiles, n_blocks, -1)
    parts = (np.ascontiguousarray(block_scales).view(np.uint8), high, low)
    return np.concatenate([part.reshape(whole) for part in parts], axis=2)


def unpack(data: Bytes, fmt: PackedFormat, shape: tuple[int, ...]) -> Codes:
    """The reverse of `pack`, for a matrix of `shape` [N, K]; still padded."""
    rows, columns = padded_shape(shape)
    n_tiles, n_blocks = rows // TILE_ROWS, columns // BLOCK_K
    blocks = data.reshape(n_tiles, n_blocks, fmt.block_bytes)
    stored = blocks[:, :, HEADER_BYTES:].reshape(n_tiles, n_blocks, -1, TILE_ROWS, 4).transpose(0, 3, 1, 2, 4)
    codes = stored if fmt.bits == 8 else np.stack([stored & 15, stored >> 4], axis=4)
    scales, block_scales = _unpack_header(np.ascontiguousarray(blocks[:, :, :HEADER_BYTES]), fmt)
    return Codes(np.ascontiguousarray(codes.reshape(rows, columns)), scales, block_scales)


def _unpack_header(
    header: Bytes, fmt: PackedFormat
) -> tuple[NDArray[np.uint16] | NDArray[np.int8], NDArray[np.uint16] | None]:
    n_tiles, n_blocks, _ = header.shape
    rows = n_tiles * TILE_ROWS
    if fmt.scale == "bf16":
        bits = header.view(np.uint16).reshape(n_tiles, n_blocks, -1, TILE_ROWS)
        return np.ascontiguousarray(bits.transpose(0, 3, 1, 2).reshape(rows, -1)), None
    block_scales = np.ascontiguousarray(header[:, :, :32]).view(np.uint16).transpose(0, 2, 1).reshape(rows, n_blocks)
    high = header[:, :, 32:64].reshape(n_tiles, n_blocks, 2, 1, TILE_ROWS)
    low = header[:, :, 64:].reshape(n_tiles, n_blocks, 4, 1, TILE_ROWS)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 1, 4, 1)
    top = (high >> shifts & 3).reshape(n_tiles, n_blocks, 8, TILE_ROWS)
    bottom = (low >> np.array([0, 4], np.uint8).reshape(1, 1, 1, 2, 1) & 15).reshape(n_tiles, n_blocks, 8, TILE_ROWS)
    scales = (top << 4 | bottom).astype(np.int8) - np.int8(32)
    return np.ascontiguousarray(scales.transpose(0, 3, 1, 2).reshape(rows, -1)), np.ascontiguousarray(block_scales)


def group_scales(quantised: Codes, fmt: PackedFormat) -> NDArray[np.float32]:
    """What each group's levels are multiplied by: float32 [rows, G]. Exact: 8 bits of mantissa times 6."""
    if fmt.scale == "bf16":
        return float_of_bf16(quantised.scales.astype(np.uint16))
    assert quantised.block_scales is not None
    spread = float_of_bf16(quantised.block_scales).repeat(BLOCK_K // fmt.group, axis=1)
    return spread * quantised.scales.astype(np.float32)


def levels_of(codes: Bytes, fmt: PackedFormat) -> NDArray[np.int16]:
    """What codes stand for, before their scale."""
    if fmt.levels is not None:
        return np.array(fmt.levels, np.int16)[codes]
    return codes.astype(np.int16) - np.int16(fmt.zero)


def decode(data: Bytes, fmt: PackedFormat, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The values of a packed matrix: float32 [N, K]. Exact: every product fits 24 bits."""
    quantised = unpack(data, fmt, shape)
    levels = levels_of(quantised.codes, fmt).astype(np.float32)
    values = levels * group_scales(quantised, fmt).repeat(fmt.group, axis=1)
    return np.ascontiguousarray(values[: shape[0], : shape[1]])


def float_of_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_of_float(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, halves to even. Finite values only."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

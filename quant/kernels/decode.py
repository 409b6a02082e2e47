"""A packed matrix as plain float32, for what is not multiplied by a packed kernel."""

import numba
import numpy as np

from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner
from quant.kernels.tiles import floats, share
from quant.kernels.vector import float_of_bits, pointer
from quant.packed import BLOCK_K, GAUSS_16, HEADER_BYTES, TILE_ROWS

# Which packed format, for kernels.
FAST_CODE, ACCURATE_CODE, Q8_CODE = 0, 1, 2
PACKED_CODES = {"fast": FAST_CODE, "accurate": ACCURATE_CODE, "q8": Q8_CODE}
LEVELS = np.array(GAUSS_16, np.float32)


@inner
def _bf16(block, index):  # type: ignore[no-untyped-def]
    """The bfloat16 number `index` of a block's header."""
    return float_of_bits(np.int32(block[2 * index]) << np.int32(16) | np.int32(block[2 * index + 1]) << np.int32(24))


@inner
def _scale(block, code, row, k):  # type: ignore[no-untyped-def]
    """What the level of one weight is multiplied by."""
    if code != ACCURATE_CODE:
        return _bf16(block, k // 32 * TILE_ROWS + row)
    group = k // 16
    high = np.int32(block[32 + group // 4 * TILE_ROWS + row]) >> np.int32(2 * (group % 4)) & np.int32(3)
    low = np.int32(block[64 + group // 2 * TILE_ROWS + row]) >> np.int32(4 * (group % 2)) & np.int32(15)
    return _bf16(block, row) * np.float32((high << np.int32(4) | low) - np.int32(32))


@inner
def _level(block, code, row, k):  # type: ignore[no-untyped-def]
    """The level of one weight."""
    if code == Q8_CODE:
        return np.float32(np.int32(block[HEADER_BYTES + k // 4 * 64 + 4 * row + k % 4]) - 128)
    pair = np.int32(block[HEADER_BYTES + k // 8 * 64 + 4 * row + k % 4])
    half = pair >> np.int32(k % 8 // 4 * 4) & np.int32(15)
    return LEVELS[half] if code == ACCURATE_CODE else np.float32(half - np.int32(8))


@inner
def _part(data, out, n, k, code, part, parts):  # type: ignore[no-untyped-def]
    block_bytes = HEADER_BYTES + TILE_ROWS * BLOCK_K // (1 if code == Q8_CODE else 2)
    n_blocks = (k + BLOCK_K - 1) // BLOCK_K
    first, end = share((n + TILE_ROWS - 1) // TILE_ROWS, part, parts)
    values = floats(out, (n, k))
    for tile in range(first, end):
        for number in range(n_blocks):
            address = data + (tile * n_blocks + number) * block_bytes
            block = numba.carray(pointer(address), (block_bytes,), np.uint8)
            for row in range(min(TILE_ROWS, n - tile * TILE_ROWS)):
                for column in range(min(BLOCK_K, k - number * BLOCK_K)):
                    value = _level(block, code, row, column) * _scale(block, code, row, column)
                    values[tile * TILE_ROWS + row, number * BLOCK_K + column] = value


def _decode(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """out float32 [n, k] = the packed matrix at `data`; both are addresses."""
    data, out, n, k, code = arguments_of(arguments, 5)
    _part(data, out, n, k, code, part, parts)
    return 0


decode = Kernel(_decode)

"""A packed matrix as plain float32, for what is not multiplied by a packed kernel."""

import numba
import numpy as np

from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner
from quant.kernels.tiles import floats, share
from quant.kernels.vector import float_of_bits, pointer
from quant.packed import BLOCK_K, GAUSS_16, LINE, PACKED_FORMATS, TILE_ROWS

# Which packed format, for kernels.
FAST_CODE, ACCURATE_CODE, Q8_CODE = 0, 1, 2
PACKED_CODES = {"fast": FAST_CODE, "accurate": ACCURATE_CODE, "q8": Q8_CODE}
BLOCK_BYTES = tuple(PACKED_FORMATS[name].block_bytes for name in PACKED_CODES)
GROUPS = tuple(PACKED_FORMATS[name].group for name in PACKED_CODES)
LEVELS = np.array(GAUSS_16, np.int32)
UPPER_HALF = np.int32(-(1 << 16))


@inner
def _word(block, line, row):  # type: ignore[no-untyped-def]
    """What a line of a block's header holds for a row: 32 bits."""
    at = line * LINE + 4 * row
    upper = np.int32(block[at + 3]) << np.int32(24) | np.int32(block[at + 2]) << np.int32(16)
    return upper | np.int32(block[at + 1]) << np.int32(8) | np.int32(block[at])


@inner
def _integer(block, code, row, group):  # type: ignore[no-untyped-def]
    """What the levels of a row's group are multiplied by before d."""
    if code == Q8_CODE:
        return np.int32(1)
    low = _word(block, 1 if code == ACCURATE_CODE else 0, row) >> np.int32(4 * group) & np.int32(15)
    if code == FAST_CODE:
        return np.int32(2) * low - np.int32(15)
    high = _word(block, 0, row) >> np.int32(2 * group) & np.int32(3)
    return (high << np.int32(4) | low) - np.int32(32)


@inner
def _level(block, code, row, k):  # type: ignore[no-untyped-def]
    """The level of one weight."""
    if code == Q8_CODE:
        return np.int32(block[LINE + k // 4 * LINE + 4 * row + k % 4]) - np.int32(128)
    header_bytes = 2 * LINE if code == ACCURATE_CODE else LINE
    pair = np.int32(block[header_bytes + k // 8 * LINE + 4 * row + k % 4])
    half = pair >> np.int32(k % 8 // 4 * 4) & np.int32(15)
    return LEVELS[half] if code == ACCURATE_CODE else half - np.int32(8)


@inner
def _decode_row(block, code, row, values):  # type: ignore[no-untyped-def]
    """values float32 [up to 128] = a row of a block."""
    d = float_of_bits(_word(block, 0, row) & UPPER_HALF)
    for first in range(0, len(values), GROUPS[code]):
        integer = _integer(block, code, row, first // GROUPS[code])
        for k in range(first, min(first + GROUPS[code], len(values))):
            values[k] = np.float32(integer * _level(block, code, row, k)) * d


@inner
def _part(data, out, n, k, code, part, parts):  # type: ignore[no-untyped-def]
    block_bytes, blocks = BLOCK_BYTES[code], (k + BLOCK_K - 1) // BLOCK_K
    first, end = share((n + TILE_ROWS - 1) // TILE_ROWS, part, parts)
    values = floats(out, (n, k))
    for tile in range(first, end):
        for number in range(blocks):
            address = data + (tile * blocks + number) * block_bytes
            block = numba.carray(pointer(address), (block_bytes,), np.uint8)
            column = number * BLOCK_K
            for row in range(min(TILE_ROWS, n - tile * TILE_ROWS)):
                target = values[tile * TILE_ROWS + row, column : min(column + BLOCK_K, k)]
                if code == FAST_CODE:
                    _decode_row(block, FAST_CODE, row, target)
                elif code == ACCURATE_CODE:
                    _decode_row(block, ACCURATE_CODE, row, target)
                else:
                    _decode_row(block, Q8_CODE, row, target)


def _decode(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """out float32 [n, k] = the packed matrix at `data`; both are addresses."""
    data, out, n, k, code = arguments_of(arguments, 5)
    _part(data, out, n, k, code, part, parts)
    return 0


decode = Kernel(_decode)

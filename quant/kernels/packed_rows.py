"""Some tiles of 16 packed rows times the tokens that they are needed for, by whichever way is faster.

Both ways give the same bits (packed_tiles.py), so the choice is one of speed alone, made from the number of tokens.

A table of tiles is int64 [24]: the addresses of up to 8 tiles, 0 for none, and of those that are read after each of
them; the rest is for packed_tiles.py. Slots 0..3 hold neighbouring tiles of a matrix, and so do slots 4..7, of the same
or of another one. Results of a token are float32 [128], 16 for each slot.
"""

from typing import NamedTuple

from quant.kernels.activations import k_blocks, record_of, scale_of
from quant.kernels.jit import inner
from quant.kernels.packed_dot import ROW_BYTES, SLOTS, block_bytes, dot_tiles
from quant.kernels.packed_tiles import multiply_tiles, uses_tiles
from quant.kernels.tile_instructions import HAS_TILES
from quant.kernels.tiles import integers
from quant.kernels.vector import TOKEN_TILE

HALF = SLOTS // 2
RESULTS = ROW_BYTES // 4  # float32 from one token's results to the next
TABLE_BYTES = 3 * SLOTS * 8


class Rows(NamedTuple):
    """`size` rows of quantised inputs from `first` on; or those whose numbers are the int64 at `numbers` on.

    Numbers, where that is not 0, are divided by `divisor`: of pairs (token, slot) it makes tokens.
    """

    first: int
    size: int
    numbers: int
    divisor: int


@inner
def set_tiles(table, place, matrix, tile, end, following, size):  # type: ignore[no-untyped-def]
    """Slots `place` to `place` + 3 of a table: tiles `tile` to `tile` + 3 of a matrix, but below `end`.

    following: address of the first tile that is read after these. size: bytes of a tile.
    """
    slots = integers(table, (2 * SLOTS,))
    for number in range(HALF):
        slots[place + number] = matrix + (tile + number) * size if tile + number < end else 0
        slots[SLOTS + place + number] = following + number * size


@inner
def _number(rows, index):  # type: ignore[no-untyped-def]
    index = rows.first + min(index, rows.size - 1)
    return integers(rows.numbers, (index + 1,))[index] // rows.divisor if rows.numbers != 0 else index


@inner
def _dot_rows(inputs, rows, table, out):  # type: ignore[no-untyped-def]
    """Four tokens at a time; the tiles are read from the cache after the first four."""
    blocks, stride = k_blocks(inputs.k), inputs.rows * 4
    for first in range(0, rows.size, TOKEN_TILE):
        numbers = (
            _number(rows, first),
            _number(rows, first + 1),
            _number(rows, first + 2),
            _number(rows, first + 3),
        )
        records = (
            record_of(inputs, numbers[0]),
            record_of(inputs, numbers[1]),
            record_of(inputs, numbers[2]),
            record_of(inputs, numbers[3]),
        )
        scales = (
            scale_of(inputs, numbers[0]),
            scale_of(inputs, numbers[1]),
            scale_of(inputs, numbers[2]),
            scale_of(inputs, numbers[3]),
        )
        count = min(TOKEN_TILE, rows.size - first)
        dot_tiles(inputs.code, table, count, records, scales, stride, blocks, out + first * RESULTS * 4)


@inner
def _multiply_with_tiles(inputs, rows, table, out, scratch):  # type: ignore[no-untyped-def]
    multiply_tiles(inputs, table, rows.first, rows.size, out, scratch)


@inner
def _no_tiles(inputs, rows, table, out, scratch):  # type: ignore[no-untyped-def]
    pass


_with_tiles = _multiply_with_tiles if HAS_TILES else _no_tiles  # a processor without has no code for them


@inner
def tile_bytes(inputs):  # type: ignore[no-untyped-def]
    """Bytes of a tile of the weights that inputs are for."""
    return k_blocks(inputs.k) * block_bytes(inputs.code)


@inner
def multiply_rows(inputs, rows, table, granted, out, scratch):  # type: ignore[no-untyped-def]
    """out float32 [rows.size rounded up to 4, 128] = rows of inputs times the tiles of a table.

    granted: whether AMX may be used; then rows have no numbers, and those up to the next multiple of 16
    are there, of inputs and of out.
    scratch: packed_tiles.SCRATCH_BYTES.
    """
    if uses_tiles(granted, rows.size):
        _with_tiles(inputs, rows, table, out, scratch)
    else:
        _dot_rows(inputs, rows, table, out)

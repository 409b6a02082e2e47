"""Two tiles of 16 packed rows times the tokens that they are needed for, by whichever way is faster.

Both ways give the same bits (packed_tiles.py), so the choice is one of speed alone, made from the number of tokens.
"""

from typing import NamedTuple

from quant.kernels.activations import k_blocks, record_of, scale_of
from quant.kernels.jit import inner
from quant.kernels.packed_dot import block_bytes, packed_pair
from quant.kernels.packed_tiles import HAS_TILES, PAIR_ROWS, multiply_pair, uses_tiles
from quant.kernels.tiles import integers
from quant.kernels.vector import TOKEN_TILE


class Rows(NamedTuple):
    """`count` rows of quantised inputs from `first` on; or those whose numbers are the int64 at `numbers` on.

    Numbers, where that is not 0, are divided by `divisor`: of pairs (token, slot) it makes tokens.
    """

    first: int
    count: int
    numbers: int
    divisor: int


@inner
def tile_address(matrix, tile, blocks, code):  # type: ignore[no-untyped-def]
    """Where a tile of 16 rows of a packed matrix begins."""
    return matrix + tile * blocks * block_bytes(code)


@inner
def _number(rows, index):  # type: ignore[no-untyped-def]
    index = rows.first + min(index, rows.count - 1)
    return integers(rows.numbers, (index + 1,))[index] // rows.divisor if rows.numbers != 0 else index


@inner
def _dot_pair(inputs, rows, pair, out):  # type: ignore[no-untyped-def]
    """Four tokens at a time; the tiles are read from the cache after the first four."""
    blocks, stride = k_blocks(inputs.k), inputs.rows * 4
    for first in range(0, rows.count, TOKEN_TILE):
        count = min(TOKEN_TILE, rows.count - first)
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
        is_last = first + count == rows.count
        addresses = (pair[0], pair[1], pair[2] if is_last else pair[0], pair[3] if is_last else pair[1])
        packed_pair(inputs.code, addresses, count, records, scales, stride, blocks, out + first * PAIR_ROWS * 4)


@inner
def _multiply_pair_with_tiles(inputs, rows, pair, out, scratch):  # type: ignore[no-untyped-def]
    multiply_pair(inputs, pair, rows.first, rows.count, k_blocks(inputs.k), out, scratch)


@inner
def _no_tiles(inputs, rows, pair, out, scratch):  # type: ignore[no-untyped-def]
    pass


_with_tiles = _multiply_pair_with_tiles if HAS_TILES else _no_tiles  # a processor without has no code for them


@inner
def multiply_rows(inputs, rows, pair, granted, out, scratch):  # type: ignore[no-untyped-def]
    """out float32 [count rounded up to 4, 32] = rows of inputs times the 2 x 16 rows of a pair of tiles.

    pair: addresses of two tiles, and of the two that will be read after them. granted: whether tiles may be used; then
    rows have no numbers, and those up to the next multiple of 32 are there. scratch: packed_tiles.SCRATCH_BYTES.
    """
    if uses_tiles(granted, rows.count):
        _with_tiles(inputs, rows, pair, out, scratch)
    else:
        _dot_pair(inputs, rows, pair, out)

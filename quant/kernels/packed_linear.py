"""x times one packed matrix."""

from typing import NamedTuple

from quant.kernels.activations import input_bytes, inputs_at, k_blocks, quantise
from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner, shared
from quant.kernels.packed_dot import SLOTS
from quant.kernels.packed_rows import RESULTS, TABLE_BYTES, Rows, multiply_rows, set_tiles, tile_bytes
from quant.kernels.packed_tiles import SCRATCH_BYTES
from quant.kernels.team import Team, barrier, take
from quant.kernels.tile_steps import TOKENS
from quant.kernels.tile_unit import use_tile_unit
from quant.kernels.tiles import floats, share
from quant.packed import BLOCK_K, TILE_ROWS

UNITS_EACH = 4  # units of up to 8 tiles that each thread gets, if there are enough


class Product(NamedTuple):
    """Addresses and sizes of one call. x, out: float32 [tokens, k], [tokens, n]. granted: whether tiles may be used."""

    x: int
    data: int
    out: int
    scratch: int
    tokens: int
    n: int
    k: int
    code: int
    granted: int


PRODUCT_FIELDS = len(Product._fields)


@shared
def padded_rows(tokens: int) -> int:
    """Rows of inputs that may be read for `tokens` tokens."""
    return (tokens + TOKENS - 1) // TOKENS * TOKENS


@shared
def part_bytes(tokens: int) -> int:
    """Scratch of one thread: results of a unit, its table of tiles, and what tiles need."""
    return padded_rows(tokens) * RESULTS * 4 + TABLE_BYTES + SCRATCH_BYTES


@shared
def scratch_bytes(tokens: int, k: int, parts: int) -> int:
    """Scratch: the quantised activations, a multiple of 64 bytes, and each thread's own."""
    inputs = input_bytes(padded_rows(tokens), k)
    return (inputs + 63) // 64 * 64 + parts * part_bytes(tokens)


@inner
def _quantise(product, inputs, team):  # type: ignore[no-untyped-def]
    blocks = k_blocks(product.k)
    first, end = share(product.tokens * blocks, team.part, team.parts)
    for number in range(first, end):
        row, block = number // blocks, number % blocks
        x = product.x + (row * product.k + block * BLOCK_K) * 4
        quantise(inputs, row, block, x, product.k - block * BLOCK_K)


@inner
def _store(product, tile, end, results):  # type: ignore[no-untyped-def]
    """out[:, 16 tile : 16 end] from float32 [tokens, 128] at `results`."""
    first, count = tile * TILE_ROWS, min(end * TILE_ROWS, product.n) - tile * TILE_ROWS
    for t in range(product.tokens):
        values = floats(results + t * RESULTS * 4, (count,))
        floats(product.out + (t * product.n + first) * 4, (count,))[:] = values


@shared
def unit_tiles(tiles: int, units: int) -> int:
    """Tiles of a unit: 2 to 8, so that there are at least `units` of them if that is possible."""
    return max(2, min(SLOTS, tiles // units // 2 * 2))


@inner
def _multiply(product, inputs, team):  # type: ignore[no-untyped-def]
    """Units of tiles, as long as there are any."""
    tiles, size = (product.n + TILE_ROWS - 1) // TILE_ROWS, tile_bytes(inputs)
    each = unit_tiles(tiles, UNITS_EACH * team.parts)
    results = product.scratch + scratch_bytes(product.tokens, product.k, team.part)
    table = results + padded_rows(product.tokens) * RESULTS * 4
    unit = take(team, 0, 1)
    while unit * each < tiles:
        following = take(team, 0, 1)
        first, end = unit * each, min(tiles, (unit + 1) * each)
        then = following * each if following * each < tiles else first
        set_tiles(table, 0, product.data, first, end, product.data + then * size, size)
        set_tiles(table, 4, product.data, first + 4, end, product.data + (then + 4) * size, size)
        multiply_rows(inputs, Rows(0, product.tokens, 0, 1), table, product.granted, results, table + TABLE_BYTES)
        _store(product, first, end, results)
        unit = following


def _packed_linear(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """out = x @ weight [n, k].T; the arguments are the fields of Product."""
    product, team = Product(*arguments_of(arguments, PRODUCT_FIELDS)), Team(part, parts, sync)
    inputs = inputs_at(product.scratch, padded_rows(product.tokens), product.k, product.code)
    _quantise(product, inputs, team)
    barrier(team)
    use_tile_unit(product.granted, product.tokens, True)
    _multiply(product, inputs, team)
    use_tile_unit(product.granted, product.tokens, False)
    return 0


packed_linear = Kernel(_packed_linear)

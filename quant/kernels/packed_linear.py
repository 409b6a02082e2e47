"""x times one packed matrix."""

from typing import NamedTuple

from quant.kernels.activations import input_bytes, inputs_at, k_blocks, quantise
from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner, shared
from quant.kernels.packed_rows import Rows, multiply_rows, tile_address
from quant.kernels.packed_tiles import PAIR_ROWS, SCRATCH_BYTES, TOKENS
from quant.kernels.team import Team, barrier, take
from quant.kernels.tile_unit import use_tile_unit
from quant.kernels.tiles import floats, share
from quant.packed import BLOCK_K, TILE_ROWS

PAIRS_EACH = 8  # shares of the pairs of tiles that each thread takes, so that all are done at about the same time


class Product(NamedTuple):
    """Addresses and sizes of one call. x, out: float32 [tokens, k] and [tokens, n]. granted: whether tiles may be used."""

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
    """Scratch of one thread: results of a pair of tiles, and what tiles need."""
    return padded_rows(tokens) * PAIR_ROWS * 4 + SCRATCH_BYTES


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
def _store(product, tile, results):  # type: ignore[no-untyped-def]
    """out[:, 16 tile : 16 tile + 32] from float32 [tokens, 32] at `results`."""
    first = tile * TILE_ROWS
    values = floats(results, (product.tokens, PAIR_ROWS))
    for t in range(product.tokens):
        target = floats(product.out + (t * product.n + first) * 4, (PAIR_ROWS,))
        for r in range(min(PAIR_ROWS, product.n - first)):
            target[r] = values[t, r]


@inner
def _multiply(product, inputs, team):  # type: ignore[no-untyped-def]
    """Pairs of tiles, some neighbours at a time, as long as there are any."""
    blocks = k_blocks(product.k)
    tiles = (product.n + TILE_ROWS - 1) // TILE_ROWS
    pairs = (tiles + 1) // 2
    each = max(1, pairs // (PAIRS_EACH * team.parts))
    results = product.scratch + scratch_bytes(product.tokens, product.k, team.part)
    first = take(team, 0, each)
    while first < pairs:
        following = take(team, 0, each)
        for number in range(first, min(first + each, pairs)):
            later = number + 1 if number + 1 < first + each else following
            tile, then = 2 * number, 2 * (later if later < pairs else number)
            pair = (
                tile_address(product.data, tile, blocks, product.code),
                tile_address(product.data, min(tile + 1, tiles - 1), blocks, product.code),
                tile_address(product.data, then, blocks, product.code),
                tile_address(product.data, min(then + 1, tiles - 1), blocks, product.code),
            )
            rows = Rows(0, product.tokens, 0, 1)
            scratch = results + padded_rows(product.tokens) * PAIR_ROWS * 4
            multiply_rows(inputs, rows, pair, product.granted, results, scratch)
            _store(product, tile, results)
        first = following


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

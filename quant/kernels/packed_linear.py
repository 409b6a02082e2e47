"""x times one packed matrix."""

from typing import NamedTuple

from numba import prange

from quant.kernels.activations import activation_bytes, k_blocks, quantise_share
from quant.kernels.jit import Kernel, inner, shared
from quant.kernels.packed_dot import RESULT_FLOATS, block_bytes, offset_of_code, packed_tile
from quant.kernels.tiles import floats, share, strided_inputs
from quant.kernels.vector import TOKEN_TILE
from quant.packed import TILE_ROWS

TILES_TOGETHER = 4  # tiles that 4 tokens are multiplied with before the next 4: 256 KiB of 4-bit rows, K = 7168
SERIAL_VALUES = 1 << 16  # activations that one thread quantises faster than a parallel region starts
SIGNATURE = "void(" + ", ".join(["int64"] * 9) + ")"


class Product(NamedTuple):
    """Addresses and sizes of one call."""

    x: int
    data: int
    out: int
    scratch: int
    tokens: int
    n: int
    k: int
    code: int


@shared
def scratch_bytes(tokens: int, k: int, parts: int) -> int:
    """Scratch: the quantised activations and, for each thread, one tile of results."""
    return tokens * activation_bytes(k) + parts * RESULT_FLOATS * 4


@inner
def _tile(product, tile, first, count, result):  # type: ignore[no-untyped-def]
    """out[first : first + count] for the 16 rows of one tile; `result`: float32 [TOKEN_TILE, 16] for use on the way."""
    stride, blocks = activation_bytes(product.k), k_blocks(product.k)
    inputs = strided_inputs(product.scratch + first * stride, stride, count)
    address = product.data + tile * blocks * block_bytes(product.code)
    packed_tile(product.code, address, count, inputs, blocks, result, TILE_ROWS * 4)
    values = floats(result, (TOKEN_TILE, TILE_ROWS))
    for t in range(count):
        target = floats(product.out + ((first + t) * product.n + tile * TILE_ROWS) * 4, (TILE_ROWS,))
        for r in range(min(TILE_ROWS, product.n - tile * TILE_ROWS)):
            target[r] = values[t, r]


@inner
def _part(product, part, parts):  # type: ignore[no-untyped-def]
    result = product.scratch + scratch_bytes(product.tokens, product.k, part)
    first_tile, end_tile = share((product.n + TILE_ROWS - 1) // TILE_ROWS, part, parts)
    for tiles in range(first_tile, end_tile, TILES_TOGETHER):
        for first in range(0, product.tokens, TOKEN_TILE):
            for tile in range(tiles, min(tiles + TILES_TOGETHER, end_tile)):
                _tile(product, tile, first, min(TOKEN_TILE, product.tokens - first), result)


@inner
def _quantise(product, part, parts):  # type: ignore[no-untyped-def]
    offset = offset_of_code(product.code)
    return quantise_share(product.x, product.tokens, product.k, offset, product.scratch, part, parts)


def _packed_linear(x, data, out, scratch, tokens, n, k, code, parts):  # type: ignore[no-untyped-def]
    """out [tokens, n] = x [tokens, k] @ weight [n, k].T; the first four are addresses."""
    product = Product(x, data, out, scratch, tokens, n, k, code)
    if parts == 1:
        _quantise(product, 0, 1)
        _part(product, 0, 1)
        return
    done = 0  # keeps Numba from fusing the loops (moe.py)
    if tokens * k < SERIAL_VALUES:
        done = parts * _quantise(product, 0, 1)
    else:
        for part in prange(parts):
            done += _quantise(product, part, parts)
    if done < parts:
        return
    for part in prange(parts):
        _part(product, part, parts)


packed_linear = Kernel(_packed_linear, SIGNATURE)

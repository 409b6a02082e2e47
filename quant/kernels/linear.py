"""x times one stored matrix."""

from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner, shared
from quant.kernels.tiles import (
    BLOCK_ROWS,
    RESULT_FLOATS,
    ROW_TILE,
    TOKEN_TILE,
    dot_tile,
    floats,
    open_rows,
    padded,
    share,
    strided_inputs,
)


@shared
def scratch_floats(k: int) -> int:
    """Scratch of one thread: a block of decoded rows and one tile of results."""
    return BLOCK_ROWS * padded(k) + RESULT_FLOATS


@inner
def _block(rows, x, tokens, out, out_stride, result):  # type: ignore[no-untyped-def]
    """One block of rows times all tokens; `out` is the address of the block's first column."""
    tile = floats(result, (TOKEN_TILE, ROW_TILE))
    for first in range(0, tokens, TOKEN_TILE):
        count = min(TOKEN_TILE, tokens - first)
        inputs = strided_inputs(x + first * rows.k * 4, rows.k * 4, count)
        for row in range(0, rows.size, ROW_TILE):
            dot_tile(rows, row, count, inputs, result)
            for t in range(count):
                target = floats(out + (first + t) * out_stride + row * 4, (ROW_TILE,))
                for r in range(min(ROW_TILE, rows.size - row)):
                    target[r] = tile[t, r]


@inner
def _part(x, weight, scale, out, scratch, tokens, n, k, code, part, parts):  # type: ignore[no-untyped-def]
    decoded = scratch + part * scratch_floats(k) * 4
    result = decoded + BLOCK_ROWS * padded(k) * 4
    first_block, end_block = share((n + BLOCK_ROWS - 1) // BLOCK_ROWS, part, parts)
    for block in range(first_block, end_block):
        first = block * BLOCK_ROWS
        rows = open_rows(code, weight, scale, first, min(BLOCK_ROWS, n - first), k, tokens, decoded)
        _block(rows, x, tokens, out + first * 4, n * 4, result)


def _linear(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """out [tokens, n] = x [tokens, k] @ weight [n, k].T. Arguments: those of _part, the first five addresses."""
    x, weight, scale, out, scratch, tokens, n, k, code = arguments_of(arguments, 9)
    _part(x, weight, scale, out, scratch, tokens, n, k, code, part, parts)
    return 0


linear = Kernel(_linear)

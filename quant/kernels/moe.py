"""The routed experts of one layer in one call.

(token, slot) pairs are sorted by expert, so each touched expert's weights are read once:
    1. hidden[p] = silu(w1 x) * (w3 x) for each pair p, threads sharing out the rows of w1 and w3;
    2. out[t] += weight[p] * (w2 hidden[p]), threads sharing out the columns of out.
The sum over a token's experts runs in ascending order of expert id (equal ids: in order of slot), whatever the slots.
"""

from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner, shared
from quant.kernels.routing import LAYER_FIELDS, Layer, sort_together, sorted_pairs
from quant.kernels.silu import silu_times
from quant.kernels.team import Team, barrier
from quant.kernels.tiles import (
    BLOCK_ROWS,
    RESULT_FLOATS,
    ROW_TILE,
    TOKEN_TILE,
    dot_tile,
    floats,
    integers,
    open_rows,
    padded,
    share,
    strided_inputs,
)

HALF_BLOCK = BLOCK_ROWS // 2  # gate and up rows share a block's buffer
TABLE_COLUMNS = 6  # addresses of w1, w3, w2 and of their scales


@shared
def scratch_floats(tokens: int, top_k: int, dim: int, inter: int, parts: int) -> int:
    """float32 values of scratch: hidden, one row a pair, then for each thread decoded rows and two tiles of results."""
    return tokens * top_k * inter + parts * (BLOCK_ROWS * padded(max(dim, inter)) + 2 * RESULT_FLOATS)


@inner
def _part_scratch(layer, part):  # type: ignore[no-untyped-def]
    return layer.scratch + 4 * scratch_floats(layer.tokens, layer.top_k, layer.dim, layer.inter, part)


@inner
def _token_input(layer, pairs, index, last):  # type: ignore[no-untyped-def]
    return layer.x + pairs[min(index, last)] // layer.top_k * layer.dim * 4


@inner
def _gate_up_block(layer, gate, up, pairs, first_row, results):  # type: ignore[no-untyped-def]
    """hidden[pair, first_row : first_row + gate.size] for one expert's pairs (numbers in `pairs`, rows in hidden)."""
    start, end, by_expert = pairs
    gates, ups = floats(results, (RESULT_FLOATS,)), floats(results + RESULT_FLOATS * 4, (RESULT_FLOATS,))
    tile = floats(results, (TOKEN_TILE, ROW_TILE))
    for first in range(start, end, TOKEN_TILE):
        count = min(TOKEN_TILE, end - first)
        inputs = (
            _token_input(layer, by_expert, first, end - 1),
            _token_input(layer, by_expert, first + 1, end - 1),
            _token_input(layer, by_expert, first + 2, end - 1),
            _token_input(layer, by_expert, first + 3, end - 1),
        )
        for row in range(0, gate.size, ROW_TILE):
            dot_tile(gate, row, count, inputs, results)
            dot_tile(up, row, count, inputs, results + RESULT_FLOATS * 4)
            silu_times(gates, ups)
            for t in range(count):
                hidden = floats(layer.scratch + ((first + t) * layer.inter + first_row + row) * 4, (ROW_TILE,))
                for r in range(min(ROW_TILE, gate.size - row)):
                    hidden[r] = tile[t, r]


@inner
def _gate_up(layer, part, parts):  # type: ignore[no-untyped-def]
    """Step 1 for one thread's rows of every touched expert."""
    starts, by_expert = sorted_pairs(layer)
    table = integers(layer.table, (layer.experts, TABLE_COLUMNS))
    decoded = _part_scratch(layer, part)
    decoded_up = decoded + HALF_BLOCK * padded(layer.dim) * 4
    results = decoded + BLOCK_ROWS * padded(max(layer.dim, layer.inter)) * 4
    first_block, end_block = share((layer.inter + HALF_BLOCK - 1) // HALF_BLOCK, part, parts)
    for expert in range(layer.experts):
        start, end = starts[expert], starts[expert + 1]
        if start == end:
            continue
        w1, w3, s1, s3 = table[expert, 0], table[expert, 1], table[expert, 3], table[expert, 4]
        for block in range(first_block, end_block):
            row = block * HALF_BLOCK
            rows = min(HALF_BLOCK, layer.inter - row)
            gate = open_rows(layer.code, w1, s1, row, rows, layer.dim, end - start, decoded)
            up = open_rows(layer.code, w3, s3, row, rows, layer.dim, end - start, decoded_up)
            _gate_up_block(layer, gate, up, (start, end, by_expert), row, results)


@inner
def _down_block(layer, down, pairs, first_row, result):  # type: ignore[no-untyped-def]
    """out[token, first_row : first_row + down.size] += weight * (w2 hidden) for one expert's pairs."""
    start, end, by_expert = pairs
    weights = floats(layer.weights, (layer.tokens * layer.top_k,))
    tile = floats(result, (TOKEN_TILE, ROW_TILE))
    for first in range(start, end, TOKEN_TILE):
        count = min(TOKEN_TILE, end - first)
        inputs = strided_inputs(layer.scratch + first * layer.inter * 4, layer.inter * 4, count)
        for row in range(0, down.size, ROW_TILE):
            dot_tile(down, row, count, inputs, result)
            for t in range(count):
                pair = by_expert[first + t]
                out = floats(layer.out + (pair // layer.top_k * layer.dim + first_row + row) * 4, (ROW_TILE,))
                for r in range(min(ROW_TILE, down.size - row)):
                    out[r] += weights[pair] * tile[t, r]


@inner
def _down(layer, part, parts):  # type: ignore[no-untyped-def]
    """Step 2 for one thread's columns of out."""
    starts, by_expert = sorted_pairs(layer)
    table = integers(layer.table, (layer.experts, TABLE_COLUMNS))
    decoded = _part_scratch(layer, part)
    result = decoded + BLOCK_ROWS * padded(max(layer.dim, layer.inter)) * 4
    first_block, end_block = share((layer.dim + BLOCK_ROWS - 1) // BLOCK_ROWS, part, parts)
    floats(layer.out, (layer.tokens, layer.dim))[:, first_block * BLOCK_ROWS : end_block * BLOCK_ROWS] = 0
    for expert in range(layer.experts):
        start, end = starts[expert], starts[expert + 1]
        if start == end:
            continue
        w2, s2 = table[expert, 2], table[expert, 5]
        for block in range(first_block, end_block):
            row = block * BLOCK_ROWS
            rows = min(BLOCK_ROWS, layer.dim - row)
            down = open_rows(layer.code, w2, s2, row, rows, layer.inter, end - start, decoded)
            _down_block(layer, down, (start, end, by_expert), row, result)


def _moe(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """One layer; the arguments are the fields of Layer. Part 0 returns 1, or 0 if an id is not in 0 .. experts - 1."""
    layer, team = Layer(*arguments_of(arguments, LAYER_FIELDS)), Team(part, parts, sync)
    if not sort_together(layer, team):
        return 0
    _gate_up(layer, part, parts)
    barrier(team)
    _down(layer, part, parts)
    return 1 if part == 0 else 0


moe_experts = Kernel(_moe)

"""The routed experts of one layer in one call.

(token, slot) pairs are sorted by expert, so each touched expert's weights are read once:
    1. hidden[p] = silu(w1 x) * (w3 x) for each pair p, threads sharing out the rows of w1 and w3;
    2. out[t] += weight[p] * (w2 hidden[p]), threads sharing out the columns of out.
The sum over a token's experts runs in ascending order of expert id (equal ids: in order of slot), whatever the slots.
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from quant.kernels.jit import Kernel, inner, shared
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
from quant.kernels.vector import float_of_bits

HALF_BLOCK = BLOCK_ROWS // 2  # gate and up rows share a block's buffer
TABLE_COLUMNS = 6  # addresses of w1, w3, w2 and of their scales
ONE, HIGHEST, LOG2_E = np.float32(1), np.float32(88.37), np.float32(1.44269504)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
POLYNOMIAL_0, POLYNOMIAL_1, POLYNOMIAL_2, POLYNOMIAL_3, POLYNOMIAL_4, POLYNOMIAL_5 = (
    np.float32(c) for c in (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665795e-2, 1.6666665e-1, 5.0e-1)
)
SIGNATURE = "int64(" + ", ".join(["int64"] * 14) + ")"


class Layer(NamedTuple):
    """Addresses and sizes of one call. x, out: float32 [tokens, dim]; ids, weights: [tokens, top_k]."""

    x: int
    ids: int
    weights: int
    table: int
    out: int
    order: int
    scratch: int
    tokens: int
    top_k: int
    experts: int
    dim: int
    inter: int
    code: int


@shared
def order_integers(tokens: int, top_k: int, experts: int) -> int:
    """int64 values that sorting needs: a start and a cursor for each expert, and the sorted pairs."""
    return 2 * experts + 1 + tokens * top_k


@shared
def hidden_floats(tokens: int, top_k: int, inter: int) -> int:
    """float32 values between the two steps, one row a pair."""
    return tokens * top_k * inter


@shared
def part_floats(dim: int, inter: int) -> int:
    """Scratch of one thread: a block of decoded rows and two tiles of results."""
    return BLOCK_ROWS * padded(max(dim, inter)) + 2 * RESULT_FLOATS


@inner
def _sort_pairs(layer):  # type: ignore[no-untyped-def]
    """Counting sort of the pairs by expert; False, with nothing read or written out of bounds, for a wrong id."""
    pairs = layer.tokens * layer.top_k
    ids = integers(layer.ids, (pairs,))
    order = integers(layer.order, (order_integers(layer.tokens, layer.top_k, layer.experts),))
    starts, cursors = order[: layer.experts + 1], order[layer.experts + 1 : 2 * layer.experts + 1]
    starts[:] = 0
    for pair in range(pairs):
        if ids[pair] < 0 or ids[pair] >= layer.experts:
            return False
        starts[ids[pair] + 1] += 1
    for expert in range(layer.experts):
        starts[expert + 1] += starts[expert]
        cursors[expert] = starts[expert]
    by_expert = order[2 * layer.experts + 1 :]
    for pair in range(pairs):
        by_expert[cursors[ids[pair]]] = pair
        cursors[ids[pair]] += 1
    return True


@inner
def _sorted_pairs(layer):  # type: ignore[no-untyped-def]
    """(starts [experts + 1], pairs [tokens * top_k]): expert e has pairs[starts[e] : starts[e + 1]]."""
    order = integers(layer.order, (order_integers(layer.tokens, layer.top_k, layer.experts),))
    return order[: layer.experts + 1], order[2 * layer.experts + 1 :]


@inner
def _part_scratch(layer, part):  # type: ignore[no-untyped-def]
    return layer.scratch + 4 * (
        hidden_floats(layer.tokens, layer.top_k, layer.inter) + part * part_floats(layer.dim, layer.inter)
    )


@inner
def _token_input(layer, pairs, index, last):  # type: ignore[no-untyped-def]
    return layer.x + pairs[min(index, last)] // layer.top_k * layer.dim * 4


@inner
def _exp(x):  # type: ignore[no-untyped-def]
    """e**x of a float32 within 2 units of the last place, infinity above 88.37; no branches, so that it vectorises.

    2**n times a polynomial on [-ln 2 / 2, ln 2 / 2]; ln 2 in two parts (Cody and Waite), coefficients of Cephes' expf.
    """
    bounded = HIGHEST if x > HIGHEST else (x if x > -HIGHEST + ONE else -HIGHEST + ONE)
    power = np.int32(bounded * LOG2_E + np.float32(128.5)) - np.int32(128)
    rest = bounded - np.float32(power) * LN2_HIGH - np.float32(power) * LN2_LOW
    value = POLYNOMIAL_0
    value = value * rest + POLYNOMIAL_1
    value = value * rest + POLYNOMIAL_2
    value = value * rest + POLYNOMIAL_3
    value = value * rest + POLYNOMIAL_4
    value = value * rest + POLYNOMIAL_5
    value = (value * rest * rest + rest + ONE) * float_of_bits(np.int32((power + np.int32(127)) << np.int32(23)))
    return np.float32(np.inf) if x > HIGHEST else value


@inner
def _silu_times(gates, ups):  # type: ignore[no-untyped-def]
    """gates = silu(gates) * ups, for one tile of each."""
    for index in range(RESULT_FLOATS):
        gate = gates[index]
        gates[index] = gate / (ONE + _exp(-gate)) * ups[index]


@inner
def _gate_up_block(layer, gate, up, pairs, first_row, results):  # type: ignore[no-untyped-def]
    """hidden[pair, first_row : first_row + gate.size] for one expert's pairs (numbers in `pairs`, rows in hidden)."""
    start, end, sorted_pairs = pairs
    gates, ups = floats(results, (RESULT_FLOATS,)), floats(results + RESULT_FLOATS * 4, (RESULT_FLOATS,))
    tile = floats(results, (TOKEN_TILE, ROW_TILE))
    for first in range(start, end, TOKEN_TILE):
        count = min(TOKEN_TILE, end - first)
        inputs = (
            _token_input(layer, sorted_pairs, first, end - 1),
            _token_input(layer, sorted_pairs, first + 1, end - 1),
            _token_input(layer, sorted_pairs, first + 2, end - 1),
            _token_input(layer, sorted_pairs, first + 3, end - 1),
        )
        for row in range(0, gate.size, ROW_TILE):
            dot_tile(gate, row, count, inputs, results)
            dot_tile(up, row, count, inputs, results + RESULT_FLOATS * 4)
            _silu_times(gates, ups)
            for t in range(count):
                hidden = floats(layer.scratch + ((first + t) * layer.inter + first_row + row) * 4, (ROW_TILE,))
                for r in range(min(ROW_TILE, gate.size - row)):
                    hidden[r] = tile[t, r]


@inner
def _gate_up(layer, part, parts):  # type: ignore[no-untyped-def]
    """Step 1 for one thread's rows of every touched expert; 1 when done."""
    starts, sorted_pairs = _sorted_pairs(layer)
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
            _gate_up_block(layer, gate, up, (start, end, sorted_pairs), row, results)
    return 1


@inner
def _down_block(layer, down, pairs, first_row, result):  # type: ignore[no-untyped-def]
    """out[token, first_row : first_row + down.size] += weight * (w2 hidden) for one expert's pairs."""
    start, end, sorted_pairs = pairs
    weights = floats(layer.weights, (layer.tokens * layer.top_k,))
    tile = floats(result, (TOKEN_TILE, ROW_TILE))
    for first in range(start, end, TOKEN_TILE):
        count = min(TOKEN_TILE, end - first)
        inputs = strided_inputs(layer.scratch + first * layer.inter * 4, layer.inter * 4, count)
        for row in range(0, down.size, ROW_TILE):
            dot_tile(down, row, count, inputs, result)
            for t in range(count):
                pair = sorted_pairs[first + t]
                out = floats(layer.out + (pair // layer.top_k * layer.dim + first_row + row) * 4, (ROW_TILE,))
                for r in range(min(ROW_TILE, down.size - row)):
                    out[r] += weights[pair] * tile[t, r]


@inner
def _down(layer, part, parts):  # type: ignore[no-untyped-def]
    """Step 2 for one thread's columns of out."""
    starts, sorted_pairs = _sorted_pairs(layer)
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
            _down_block(layer, down, (start, end, sorted_pairs), row, result)


def _moe(x, ids, weights, table, out, order, scratch, tokens, top_k, experts, dim, inter, code, parts):  # type: ignore[no-untyped-def]
    """One layer; the arguments are the fields of Layer. 1 when done, 0 if an id is not in 0 .. experts - 1."""
    layer = Layer(x, ids, weights, table, out, order, scratch, tokens, top_k, experts, dim, inter, code)
    if not _sort_pairs(layer):
        return 0
    if parts == 1:
        _gate_up(layer, 0, 1)
        _down(layer, 0, 1)
        return 1
    # Numba sees no dependency through addresses and would fuse the loops, though the second needs all of the first:
    # the count between them keeps them apart.
    done = 0
    for part in prange(parts):
        done += _gate_up(layer, part, parts)
    if done < parts:
        return 0
    for part in prange(parts):
        _down(layer, part, parts)
    return 1


moe_experts = Kernel(_moe, SIGNATURE)

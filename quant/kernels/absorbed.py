"""Attention of few queries to the latents of a cache, with wkv_b absorbed into queries and output.

Threads share out the heads. A thread takes as many of its heads together as make a few dozen rows, a row for each head
and token:
    1. queries[row] = scale * [q_nope w_uk | q_pe], as wide as a cached latent;
    2. weighted[row] = the sum of the cached latents, weighted with the softmax of their scores (online_softmax.py);
    3. out[row] = w_uv weighted[row].
"""

from typing import NamedTuple

import numpy as np

from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner, shared
from quant.kernels.online_softmax import (
    BLOCK,
    TILE_FLOATS,
    Keys,
    Queries,
    attend_tile,
    begin,
    copy_scaled,
    dot,
    dot_one,
    finish,
    rows_of,
    weigh,
    weigh_one,
)
from quant.kernels.packed_heads import Q8_HEADS, SUMS, absorb_packed, expand_packed
from quant.kernels.plain import halves, put
from quant.kernels.tiles import floats, integers, padded, share, strided_inputs
from quant.kernels.vector import BF16_CODE, ROW_TILE, TOKEN_TILE, float_of_bits
from quant.packed import BLOCK_K, FAST, Q8, TILE_ROWS

Q8_BYTES, FAST_BYTES = Q8.block_bytes, FAST.block_bytes
ROWS_TOGETHER = 32  # queries that share the reading of the cache, where a single head has fewer


class Attention(NamedTuple):
    """Addresses and sizes of one call; strides in bytes. The queries are those of the last of the `seen` tokens."""

    q_nope: int  # [tokens, heads, nope]
    q_pe: int  # [tokens, heads, rope]
    cached: int  # [seen, lora + rope]
    wkv_b: int  # [heads, nope + value, lora]; packed: [heads, tiles, blocks, bytes of a block]
    out: int  # [tokens, heads, value]
    scratch: int  # float32 [parts, scratch_floats]
    tokens: int
    seen: int
    heads: int
    nope: int
    rope: int
    value: int
    lora: int
    nope_token: int  # strides of q_nope and q_pe from token to token and from head to head
    nope_head: int
    pe_token: int
    pe_head: int
    scale: int  # float32 bits
    code: int  # of q_nope, q_pe, cached and out
    wkv_code: int  # of wkv_b: F32_CODE, BF16_CODE, Q8_HEADS or FAST_HEADS


ATTENTION_FIELDS = len(Attention._fields)


@shared
def heads_together(tokens: int) -> int:
    """Heads that one thread works on at a time."""
    return max(1, ROWS_TOGETHER // tokens)


@shared
def rows_at_most(tokens: int) -> int:
    """Rows of these heads, filled up to whole tiles, and one more to write to where there is nothing to write."""
    return (heads_together(tokens) * tokens + TOKEN_TILE - 1) // TOKEN_TILE * TOKEN_TILE + 1


@shared
def scratch_floats(tokens: int, nope: int, rope: int, lora: int) -> int:
    """float32 values of scratch of one thread: queries, their sums, the queries of one head, and tiles."""
    row = padded(lora + rope) + padded(lora) + 4
    return rows_at_most(tokens) * row + (tokens + TOKEN_TILE) * padded(nope) + SUMS + TILE_FLOATS


@inner
def _row_bytes(attention, rows):  # type: ignore[no-untyped-def]
    """Bytes of `rows` rows of wkv_b. Packed ones are whole tiles."""
    if attention.wkv_code < Q8_HEADS:
        return rows * attention.lora * (4 >> attention.wkv_code)
    block = Q8_BYTES if attention.wkv_code == Q8_HEADS else FAST_BYTES
    return rows // TILE_ROWS * (attention.lora // BLOCK_K) * block


@inner
def _open_scratch(attention, part):  # type: ignore[no-untyped-def]
    """A thread's rows; and float32 [tokens and 4 of zeros, padded(nope)] for one head's queries, then SUMS more."""
    tokens, nope, rope, lora = attention.tokens, attention.nope, attention.rope, attention.lora
    rows, width = rows_at_most(tokens), padded(lora + rope) * 4
    values = attention.scratch + part * scratch_floats(tokens, nope, rope, lora) * 4
    weighted = values + rows * width
    maxima = weighted + rows * padded(lora) * 4
    totals = maxima + rows * 4
    tiles = totals + rows * 12
    queries = Queries(values, width, weighted, padded(lora) * 4, maxima, totals, totals + rows * 4, tiles)
    return queries, tiles + TILE_FLOATS * 4


@inner
def _open_head(attention, wide, head):  # type: ignore[no-untyped-def]
    """wide[token] = scale * q_nope of one head, with zeros behind."""
    scale = float_of_bits(np.int32(attention.scale))
    values = floats(wide, (attention.tokens + TOKEN_TILE, padded(attention.nope)))
    values[:] = 0
    for token in range(attention.tokens):
        source = attention.q_nope + token * attention.nope_token + head * attention.nope_head
        copy_scaled(source, attention.code, scale, values[token, : attention.nope])


@inner
def _absorb(attention, queries, wide, head, row):  # type: ignore[no-untyped-def]
    """The latent part of queries[row + token] for the tokens of one head."""
    tokens, nope, lora, spare = attention.tokens, attention.nope, attention.lora, rows_at_most(attention.tokens) - 1
    matrix, stride = attention.wkv_b + head * _row_bytes(attention, nope + attention.value), _row_bytes(attention, 1)
    if attention.wkv_code >= Q8_HEADS:
        sums = wide + (tokens + TOKEN_TILE) * padded(nope) * 4
        for token in range(tokens):
            target, source = queries.values + (row + token) * queries.stride, wide + token * padded(nope) * 4
            absorb_packed(attention.wkv_code, matrix, nope // TILE_ROWS, lora // BLOCK_K, source, sums, target)
        return
    if tokens == 1:
        weigh_one(attention.wkv_code, matrix, stride, nope, wide, queries.values + row * queries.stride, lora)
        return
    for token in range(0, tokens, TOKEN_TILE):
        shares = wide + token * padded(nope) * 4
        targets = (
            queries.values + (row + token) * queries.stride,
            queries.values + (row + token + 1 if token + 1 < tokens else spare) * queries.stride,
            queries.values + (row + token + 2 if token + 2 < tokens else spare) * queries.stride,
            queries.values + (row + token + 3 if token + 3 < tokens else spare) * queries.stride,
        )
        weigh(attention.wkv_code, matrix, stride, nope, shares, padded(nope) * 4, targets, lora, 0)


@inner
def _open_queries(attention, queries, wide, first_head, heads):  # type: ignore[no-untyped-def]
    """Step 1 for `heads` heads from `first_head` on."""
    tokens, lora, rope, rows = attention.tokens, attention.lora, attention.rope, rows_at_most(attention.tokens)
    scale = float_of_bits(np.int32(attention.scale))
    values = floats(queries.values, (rows, queries.stride // 4))
    positions = integers(queries.positions, (rows,))
    values[:] = 0
    positions[:] = -1
    for number in range(heads):
        head = first_head + number
        _open_head(attention, wide, head)
        _absorb(attention, queries, wide, head, number * tokens)
        for token in range(tokens):
            source = attention.q_pe + token * attention.pe_token + head * attention.pe_head
            copy_scaled(source, attention.code, scale, values[number * tokens + token, lora : lora + rope])
            positions[number * tokens + token] = attention.seen - tokens + token
    begin(queries, rows)


@inner
def _write(attention, token, head, row, values):  # type: ignore[no-untyped-def]
    """out[token, head, row : row + len(values)] = values, as far as it goes."""
    address = attention.out + ((token * attention.heads + head) * attention.value + row) * (4 >> attention.code)
    for number in range(min(len(values), attention.value - row)):
        if attention.code == BF16_CODE:
            put(halves(address, values.shape), number, values[number])
        else:
            put(floats(address, values.shape), number, values[number])


@inner
def _expand_packed(attention, queries, wide, head, row):  # type: ignore[no-untyped-def]
    tokens, nope, value, lora = attention.tokens, attention.nope, attention.value, attention.lora
    matrix = attention.wkv_b + head * _row_bytes(attention, nope + value) + _row_bytes(attention, nope)
    results = wide + (tokens + TOKEN_TILE) * padded(nope) * 4
    for token in range(tokens):
        weighted = queries.weighted + (row + token) * queries.weighted_stride
        expand_packed(attention.wkv_code, matrix, value // TILE_ROWS, lora // BLOCK_K, weighted, results)
        _write(attention, token, head, 0, floats(results, (value,)))


@inner
def _expand(attention, queries, wide, head, row):  # type: ignore[no-untyped-def]
    """Step 3 for the tokens of one head, whose rows begin at `row`."""
    tokens, lora = attention.tokens, attention.lora
    for token in range(tokens):
        finish(queries, row + token, lora)
    if attention.wkv_code >= Q8_HEADS:
        _expand_packed(attention, queries, wide, head, row)
        return
    stored, first_row = _row_bytes(attention, 1), head * (attention.nope + attention.value) + attention.nope
    matrix = attention.wkv_b + first_row * stored
    tile = floats(queries.tiles, (TOKEN_TILE, ROW_TILE))
    for first in range(0, attention.value, ROW_TILE):
        sources = rows_of(matrix, stored, first, attention.value - 1)
        for token in range(0, tokens, TOKEN_TILE):
            count, stride = min(TOKEN_TILE, tokens - token), queries.weighted_stride
            inputs = strided_inputs(queries.weighted + (row + token) * stride, stride, count)
            if tokens == 1:
                dot_one(attention.wkv_code, sources, inputs[0], lora, queries.tiles)
            else:
                dot(attention.wkv_code, sources, inputs, lora, queries.tiles)
            for number in range(count):
                _write(attention, token + number, head, first, tile[number])


@inner
def _attend_heads(attention, queries, wide, first_head, heads):  # type: ignore[no-untyped-def]
    _open_queries(attention, queries, wide, first_head, heads)
    width = attention.lora + attention.rope
    stride = width * (4 >> attention.code)
    for first in range(0, attention.seen, BLOCK):
        address, size = attention.cached + first * stride, min(BLOCK, attention.seen - first)
        keys = Keys(address, stride, width, 0, address, stride, attention.lora, first, size, attention.code)
        for row in range(0, heads * attention.tokens, TOKEN_TILE):
            attend_tile(queries, row, keys)
    for number in range(heads):
        _expand(attention, queries, wide, first_head + number, number * attention.tokens)


def _attend_absorbed(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """The fields of Attention."""
    attention = Attention(*arguments_of(arguments, ATTENTION_FIELDS))
    queries, wide = _open_scratch(attention, part)
    first, end = share(attention.heads, part, parts)
    together = heads_together(attention.tokens)
    for head in range(first, end, together):
        _attend_heads(attention, queries, wide, head, min(together, end - head))
    return 0


attend_absorbed = Kernel(_attend_absorbed)

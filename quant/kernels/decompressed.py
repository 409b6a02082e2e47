"""Attention of many queries to keys and values that were made of a block of cached latents.

The work is cut into units of one head and some queries, which threads take one after the other. The queries of a unit
see the whole block, a few keys at a time (online_softmax.py); their sums lie in `state` from one block to the next.
"""

from typing import NamedTuple

import numpy as np

from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner, shared
from quant.kernels.online_softmax import TILE_FLOATS, Keys, Queries, attend_tile, begin, copy_scaled, finish
from quant.kernels.plain import halves, put
from quant.kernels.team import Team, take
from quant.kernels.tiles import floats, padded
from quant.kernels.vector import BF16_CODE, F32_CODE, TOKEN_TILE, float_of_bits

UNIT = 64  # queries of a unit, a multiple of 4
KEYS_TOGETHER = 32  # keys and values that stay in the first-level cache while a unit's queries see them


class Chunk(NamedTuple):
    """Addresses and sizes of one call; strides in bytes. The queries are those of the last of the `seen` tokens."""

    q_nope: int  # [tokens, heads, nope]
    q_pe: int  # [tokens, heads, rope]
    cached: int  # [seen, latent], whose last `rope` values are the keys' rope part
    made: int  # float32 [size, heads, nope + value], keys and values of the block
    out: int  # [tokens, heads, value], written with the last block
    state: int  # float32 [heads, units, state_floats]
    scratch: int  # float32 [parts, scratch_floats]
    tokens: int
    seen: int
    first: int  # position of the block's first key
    size: int  # of the block
    heads: int
    nope: int
    rope: int
    value: int
    latent: int
    nope_token: int  # strides of q_nope and q_pe from token to token and from head to head
    nope_head: int
    pe_token: int
    pe_head: int
    scale: int  # float32 bits
    code: int  # of q_nope, q_pe, cached and out


CHUNK_FIELDS = len(Chunk._fields)


@shared
def units(tokens: int) -> int:
    """Units of each head."""
    return (tokens + UNIT - 1) // UNIT


@shared
def state_floats(value: int) -> int:
    """float32 values of a unit's sums: weighted values, maxima and totals."""
    return UNIT * (padded(value) + 2)


@shared
def scratch_floats(nope: int, rope: int, block: int) -> int:
    """float32 values of scratch of one thread: a unit's queries, the keys of a head, and tiles."""
    return (UNIT + block) * padded(nope + rope) + TILE_FLOATS


@inner
def _open_queries(chunk, head, first, scratch):  # type: ignore[no-untyped-def]
    """The queries of one head from token `first` on, scaled; rows beyond the last token are zero."""
    width, scale = padded(chunk.nope + chunk.rope), float_of_bits(np.int32(chunk.scale))
    values = floats(scratch, (UNIT, width))
    values[:] = 0
    for row in range(min(UNIT, chunk.tokens - first)):
        token = first + row
        source = chunk.q_nope + token * chunk.nope_token + head * chunk.nope_head
        copy_scaled(source, chunk.code, scale, values[row, : chunk.nope])
        source = chunk.q_pe + token * chunk.pe_token + head * chunk.pe_head
        copy_scaled(source, chunk.code, scale, values[row, chunk.nope : chunk.nope + chunk.rope])
    weighted = chunk.state + (head * units(chunk.tokens) + first // UNIT) * state_floats(chunk.value) * 4
    maxima = weighted + UNIT * padded(chunk.value) * 4
    tiles = scratch + (UNIT + chunk.size) * width * 4
    start = chunk.seen - chunk.tokens + first
    stride = padded(chunk.value) * 4
    return Queries(scratch, width * 4, weighted, stride, maxima, maxima + UNIT * 4, start, UNIT, tiles)


@inner
def _open_keys(chunk, head, count, target):  # type: ignore[no-untyped-def]
    """The first `count` keys of one head, float32 [count, padded(nope + rope)] at `target`."""
    width, one = padded(chunk.nope + chunk.rope), np.float32(1)
    keys = floats(target, (count, width))
    item, wide = 4 >> chunk.code, chunk.nope + chunk.value
    for key in range(count):
        source = chunk.made + (key * chunk.heads + head) * wide * 4
        copy_scaled(source, F32_CODE, one, keys[key, : chunk.nope])
        source = chunk.cached + ((chunk.first + key) * chunk.latent + chunk.latent - chunk.rope) * item
        copy_scaled(source, chunk.code, one, keys[key, chunk.nope : chunk.nope + chunk.rope])


@inner
def _see(chunk, queries, rows, head, count, keys):  # type: ignore[no-untyped-def]
    """Let a unit's rows see the block's first `count` keys, which lie at `keys`, and their values."""
    stride, value_stride = queries.stride, chunk.heads * (chunk.nope + chunk.value) * 4
    values = chunk.made + (head * (chunk.nope + chunk.value) + chunk.nope) * 4
    for key in range(0, count, KEYS_TOGETHER):
        some = Keys(
            keys + key * stride,
            stride,
            chunk.nope + chunk.rope,
            values + key * value_stride,
            value_stride,
            chunk.value,
            chunk.first + key,
            min(KEYS_TOGETHER, count - key),
            F32_CODE,
        )
        for row in range(0, rows, TOKEN_TILE):
            attend_tile(queries, row, some)


@inner
def _write(chunk, queries, rows, head, first):  # type: ignore[no-untyped-def]
    """out[first : first + rows, head] of a unit that has seen all blocks."""
    for row in range(rows):
        values = finish(queries, row, chunk.value)
        address = chunk.out + ((first + row) * chunk.heads + head) * chunk.value * (4 >> chunk.code)
        if chunk.code == BF16_CODE:
            low = halves(address, (chunk.value,))
            for index in range(chunk.value):
                put(low, index, values[index])
        else:
            floats(address, (chunk.value,))[:] = values


@inner
def _attend_unit(chunk, head, first, scratch):  # type: ignore[no-untyped-def]
    queries = _open_queries(chunk, head, first, scratch)
    if chunk.first == 0:
        begin(queries, UNIT)
    rows = min(UNIT, chunk.tokens - first)
    count = min(chunk.size, queries.start + rows - chunk.first)
    if count > 0:
        keys = scratch + UNIT * queries.stride
        _open_keys(chunk, head, count, keys)
        _see(chunk, queries, rows, head, count, keys)
    if chunk.first + chunk.size == chunk.seen:
        _write(chunk, queries, rows, head, first)


def _attend_block(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """The fields of Chunk. The last units, which see most keys, come first."""
    chunk, team = Chunk(*arguments_of(arguments, CHUNK_FIELDS)), Team(part, parts, sync)
    scratch = chunk.scratch + part * scratch_floats(chunk.nope, chunk.rope, chunk.size) * 4
    count = chunk.heads * units(chunk.tokens)
    unit = take(team, 0, 1)
    while unit < count:
        number = units(chunk.tokens) - 1 - unit // chunk.heads
        _attend_unit(chunk, unit % chunk.heads, number * UNIT, scratch)
        unit = take(team, 0, 1)
    return 0


attend_block = Kernel(_attend_block)

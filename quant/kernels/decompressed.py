"""Attention of many queries to keys and values that were made of a block of cached latents.

The work is cut into units of one head and some queries, which threads take one after the other. The queries of a unit
see the whole block, a few keys at a time (online_softmax.py); their sums lie in `state` from one block to the next.
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
    copy_columns,
    copy_scaled,
    finish,
)
from quant.kernels.plain import halves, put
from quant.kernels.team import Team, take
from quant.kernels.tiles import floats, integers, padded
from quant.kernels.vector import BF16_CODE, F32_CODE, TOKEN_TILE, float_of_bits

UNIT = 128  # queries of a unit, a multiple of 4


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
    """float32 values of scratch of one thread: a unit's queries and positions, the keys of a head, and tiles."""
    return UNIT * (padded(nope + rope) + 2) + key_groups(block) * BLOCK * padded(nope + rope) + TILE_FLOATS


@shared
def key_groups(block: int) -> int:
    """Keys are seen by BLOCK at a time."""
    return (block + BLOCK - 1) // BLOCK


@inner
def _open_queries(chunk, head, first, scratch):  # type: ignore[no-untyped-def]
    """The queries of one head from token `first` on, scaled; rows beyond the last token are zero."""
    width, scale = padded(chunk.nope + chunk.rope), float_of_bits(np.int32(chunk.scale))
    tiles = scratch + key_groups(chunk.size) * BLOCK * width * 4
    positions = tiles + TILE_FLOATS * 4
    values, last = floats(positions + UNIT * 8, (UNIT, width)), integers(positions, (UNIT,))
    values[:] = 0
    last[:] = -1
    for row in range(min(UNIT, chunk.tokens - first)):
        token = first + row
        last[row] = chunk.seen - chunk.tokens + token
        source = chunk.q_nope + token * chunk.nope_token + head * chunk.nope_head
        copy_scaled(source, chunk.code, scale, values[row, : chunk.nope])
        source = chunk.q_pe + token * chunk.pe_token + head * chunk.pe_head
        copy_scaled(source, chunk.code, scale, values[row, chunk.nope : chunk.nope + chunk.rope])
    weighted = chunk.state + (head * units(chunk.tokens) + first // UNIT) * state_floats(chunk.value) * 4
    maxima = weighted + UNIT * padded(chunk.value) * 4
    stride = padded(chunk.value) * 4
    return Queries(positions + UNIT * 8, width * 4, weighted, stride, maxima, maxima + UNIT * 4, positions, tiles)


@inner
def _open_keys(chunk, head, count, keys):  # type: ignore[no-untyped-def]
    """The first `count` keys of one head: for each BLOCK of them float32 [nope + rope, BLOCK] at `keys`."""
    item, stride = 4 >> chunk.code, chunk.heads * (chunk.nope + chunk.value) * 4
    for key in range(0, count, BLOCK):
        target = keys + key * padded(chunk.nope + chunk.rope) * 4
        rows, readable = min(BLOCK, count - key), chunk.size - key
        source = chunk.made + key * stride + head * (chunk.nope + chunk.value) * 4
        copy_columns(source, F32_CODE, stride, rows, chunk.nope, readable, target, BLOCK * 4)
        target += chunk.nope * BLOCK * 4
        source = chunk.cached + ((chunk.first + key + 1) * chunk.latent - chunk.rope) * item
        copy_columns(source, chunk.code, chunk.latent * item, rows, chunk.rope, readable, target, BLOCK * 4)


@inner
def _see(chunk, queries, rows, head, count, keys):  # type: ignore[no-untyped-def]
    """Let a unit's rows see the block's first `count` keys, which lie at `keys`, and their values."""
    value_stride, width = chunk.heads * (chunk.nope + chunk.value) * 4, chunk.nope + chunk.rope
    values = chunk.made + (head * (chunk.nope + chunk.value) + chunk.nope) * 4
    for key in range(0, count, BLOCK):
        some = Keys(
            keys + key * padded(width) * 4,
            BLOCK * 4,
            width,
            1,
            values + key * value_stride,
            value_stride,
            chunk.value,
            chunk.first + key,
            min(BLOCK, count - key),
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
    count = min(chunk.size, chunk.seen - chunk.tokens + first + rows - chunk.first)
    if count > 0:
        _open_keys(chunk, head, count, scratch)
        _see(chunk, queries, rows, head, count, scratch)
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

"""Queries over a block of keys and values with an online softmax: the middle of both forms of attention.

Query rows are worked on by fours, and each row has a running maximum of its scores, a total of exp(score - maximum) and
a sum of values weighted with these, both rescaled when the maximum grows. A row's sums run in an order that depends
neither on the other rows nor on threads.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from quant.kernels.jit import inner
from quant.kernels.plain import get, halves, inner_sum
from quant.kernels.silu import exp
from quant.kernels.tiles import floats, strided_inputs
from quant.kernels.vector import (
    BF16_CODE,
    F32,
    F32_CODE,
    POINTER,
    ROW_TILE,
    STORED,
    TOKEN_TILE,
    VF,
    _decode,
    _loop_over_k,
    _offset,
    i64,
    load_lanes,
    make_dot,
    multiply_add,
    splat,
)

BLOCK = 64  # keys between two looks at the maximum, at most
TILE_FLOATS = TOKEN_TILE * (BLOCK + ROW_TILE)  # scratch: scores of 4 rows, and a tile of 4 by 4 of them
LOWEST = np.float32(-np.inf)


class Queries(NamedTuple):
    """Rows of queries and their sums: addresses, float32. Their number is a multiple of 4.

    Row r sees the keys up to the position start + r % period.
    """

    values: int  # [rows, stride / 4]
    stride: int  # bytes from one row to the next
    weighted: int  # [rows, width of values rounded up to 16]
    weighted_stride: int
    maxima: int  # [rows]
    totals: int  # [rows]
    start: int
    period: int
    tiles: int  # scratch of TILE_FLOATS


class Keys(NamedTuple):
    """`size` keys and values, up to BLOCK, the first one at position `first`. Strides in bytes."""

    keys: int
    stride: int
    width: int
    values: int
    value_stride: int
    value_width: int
    first: int
    size: int
    code: int  # F32_CODE or BF16_CODE


def make_weigh(code: int, rows: int) -> Any:
    """Intrinsic: targets[t][: k] += sum over r of shares[t, r] times source row r, for ROW_TILE source rows.

    weigh(sources, shares, stride, targets, k): addresses of the source rows, of float32 shares whose rows are `stride`
    bytes apart, and of `rows` targets, float32 of k values rounded up to 16.
    """

    @intrinsic
    def weigh(typingctx, sources, shares, stride, targets, k):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_weigh(builder, code, rows, args)
            return context.get_dummy_value()

        source_type, target_type = types.UniTuple(types.int64, ROW_TILE), types.UniTuple(types.int64, rows)
        return types.void(source_type, types.int64, types.int64, target_type, types.int64), codegen

    return weigh


def _emit_weigh(builder: Any, code: int, rows: int, args: Any) -> None:
    sources_arg, shares, stride, targets_arg, k = args
    sources = [builder.extract_value(sources_arg, r) for r in range(ROW_TILE)]
    targets = [builder.extract_value(targets_arg, t) for t in range(rows)]
    factors = [[_factor(builder, shares, stride, t, r) for r in range(ROW_TILE)] for t in range(rows)]

    def step(at: Any, _: list[Any], mask: Any) -> list[Any]:
        loaded = [
            load_lanes(builder, _offset(builder, source, at, 4 >> code), STORED[code], mask) for source in sources
        ]
        values = [_decode(builder, code, stored, None) for stored in loaded]
        for target, shares_of_target in zip(targets, factors, strict=True):
            address = _offset(builder, target, at, 4)
            total = load_lanes(builder, address, F32, None)
            for factor, value in zip(shares_of_target, values, strict=True):
                total = multiply_add(builder, factor, value, total)
            builder.store(total, builder.inttoptr(address, POINTER)).align = 4
        return []

    _loop_over_k(builder, k, [], step)


def _factor(builder: Any, shares: Any, stride: Any, t: int, r: int) -> Any:
    address = builder.add(shares, builder.add(builder.mul(stride, i64(t)), i64(4 * r)))
    value = builder.load(builder.inttoptr(address, POINTER), typ=F32)
    value.align = 4
    return splat(builder, value, VF)


_dot_f32, _dot_bf16 = (make_dot(code, TOKEN_TILE) for code in (F32_CODE, BF16_CODE))
_dot_one_f32, _dot_one_bf16 = (make_dot(code, 1) for code in (F32_CODE, BF16_CODE))
_weigh_f32, _weigh_bf16 = (make_weigh(code, TOKEN_TILE) for code in (F32_CODE, BF16_CODE))
_weigh_one_f32, _weigh_one_bf16 = (make_weigh(code, 1) for code in (F32_CODE, BF16_CODE))


@inner
def dot(code, sources, inputs, k, result):  # type: ignore[no-untyped-def]
    """float32 [4, 4] at `result` = 4 inputs, float32, times 4 source rows of `k` values; all are addresses."""
    if code == BF16_CODE:
        _dot_bf16(sources, inputs, 0, k, result)
    else:
        _dot_f32(sources, inputs, 0, k, result)


@inner
def dot_one(code, sources, values, k, result):  # type: ignore[no-untyped-def]
    """The first row of `dot`."""
    if code == BF16_CODE:
        _dot_one_bf16(sources, (values,), 0, k, result)
    else:
        _dot_one_f32(sources, (values,), 0, k, result)


@inner
def weigh(code, sources, shares, stride, targets, k):  # type: ignore[no-untyped-def]
    """Add 4 source rows of `k` values to each of 4 targets, weighted (make_weigh)."""
    if code == BF16_CODE:
        _weigh_bf16(sources, shares, stride, targets, k)
    else:
        _weigh_f32(sources, shares, stride, targets, k)


@inner
def weigh_one(code, sources, shares, target, k):  # type: ignore[no-untyped-def]
    """The same with one target."""
    if code == BF16_CODE:
        _weigh_one_bf16(sources, shares, 0, (target,), k)
    else:
        _weigh_one_f32(sources, shares, 0, (target,), k)


@inner
def copy_scaled(source, code, scale, target):  # type: ignore[no-untyped-def]
    """target = the values at `source` times scale."""
    if code == BF16_CODE:
        low = halves(source, target.shape)
        for index in range(target.size):
            target[index] = get(low, index) * scale
    else:
        values = floats(source, target.shape)
        for index in range(target.size):
            target[index] = values[index] * scale


@inner
def rows_of(address, stride, first, last):  # type: ignore[no-untyped-def]
    """Addresses of 4 rows from `first` on; those beyond `last` repeat it."""
    return (
        address + first * stride,
        address + min(first + 1, last) * stride,
        address + min(first + 2, last) * stride,
        address + min(first + 3, last) * stride,
    )


@inner
def begin(queries, rows):  # type: ignore[no-untyped-def]
    """Sums of no keys."""
    floats(queries.weighted, (rows * queries.weighted_stride // 4,))[:] = 0
    floats(queries.maxima, (rows,))[:] = LOWEST
    floats(queries.totals, (rows,))[:] = 0


@inner
def _score(queries, row, keys, count):  # type: ignore[no-untyped-def]
    """Scores [4, BLOCK] of 4 query rows and the first `count` keys, and what follows up to a whole 4."""
    scores = floats(queries.tiles, (TOKEN_TILE, BLOCK))
    result = queries.tiles + TOKEN_TILE * BLOCK * 4
    tile = floats(result, (TOKEN_TILE, ROW_TILE))
    inputs = strided_inputs(queries.values + row * queries.stride, queries.stride, TOKEN_TILE)
    for key in range(0, count, ROW_TILE):
        sources = rows_of(keys.keys, keys.stride, key, keys.size - 1)
        dot(keys.code, sources, inputs, keys.width, result)
        for number in range(TOKEN_TILE):
            for column in range(ROW_TILE):
                scores[number, key + column] = tile[number, column]


@inner
def _largest(scores, largest):  # type: ignore[no-untyped-def]
    for score in scores:
        if score > largest:
            largest = score
    return largest


@inner
def _powers(scores, largest):  # type: ignore[no-untyped-def]
    """scores = exp(scores - largest); NaN stays."""
    for index in range(scores.size):
        distance = scores[index] - largest
        scores[index] = exp(distance) if distance <= 0 else distance


@inner_sum
def _sum(values):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for value in values:
        total += value
    return total


@inner
def _soften(scores, visible, queries, row, width):  # type: ignore[no-untyped-def]
    """Turn one row's scores into shares, 0 beyond the `visible` ones, and let the row's sums keep up."""
    scores[visible:] = 0
    if visible == 0:
        return
    maxima, totals = floats(queries.maxima, (row + 1,)), floats(queries.totals, (row + 1,))
    largest = _largest(scores[:visible], maxima[row])
    if largest > maxima[row]:
        shrink = exp(maxima[row] - largest) if totals[row] != 0 else np.float32(0)
        weighted = floats(queries.weighted + row * queries.weighted_stride, (width,))
        for index in range(width):
            weighted[index] *= shrink
        totals[row] *= shrink
        maxima[row] = largest
    _powers(scores[:visible], largest)
    totals[row] += _sum(scores[:visible])


@inner
def _visible(queries, row, keys):  # type: ignore[no-untyped-def]
    """How many of the keys a row sees."""
    return max(0, min(keys.size, queries.start + row % queries.period + 1 - keys.first))


@inner
def attend_tile(queries, row, keys):  # type: ignore[no-untyped-def]
    """Let 4 rows of queries, from `row` on, see a block of keys and values."""
    most = 0
    for number in range(TOKEN_TILE):
        most = max(most, _visible(queries, row + number, keys))
    if most == 0:
        return
    _score(queries, row, keys, most)
    scores = floats(queries.tiles, (TOKEN_TILE, BLOCK))
    for number in range(TOKEN_TILE):
        visible = _visible(queries, row + number, keys)
        _soften(scores[number], visible, queries, row + number, keys.value_width)
    targets = strided_inputs(queries.weighted + row * queries.weighted_stride, queries.weighted_stride, TOKEN_TILE)
    for key in range(0, most, ROW_TILE):
        sources = rows_of(keys.values, keys.value_stride, key, keys.size - 1)
        weigh(keys.code, sources, queries.tiles + key * 4, BLOCK * 4, targets, keys.value_width)


@inner
def finish(queries, row, width):  # type: ignore[no-untyped-def]
    """Divide a row's weighted sum by its total."""
    weighted = floats(queries.weighted + row * queries.weighted_stride, (width,))
    total = floats(queries.totals, (row + 1,))[row]
    for index in range(width):
        weighted[index] /= total
    return weighted

"""Queries over a block of keys and values with an online softmax: the middle of both forms of attention.

Query rows are worked on by fours, and each row has a running maximum of its scores, a total of exp(score - maximum) and
a sum of values weighted with these, both rescaled when the maximum grows. A row's sums run in an order that depends
neither on the other rows nor on threads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quant.kernels import silu
from quant.kernels.jit import inner
from quant.kernels.plain import get, halves
from quant.kernels.silu import exp
from quant.kernels.tiles import floats, integers, padded, strided_inputs
from quant.kernels.vector import (
    BF16_CODE,
    F32,
    F32_CODE,
    I32,
    I64,
    LANES,
    POINTER,
    ROW_TILE,
    STORED,
    TOKEN_TILE,
    VF,
    VI,
    _decode,
    _offset,
    i64,
    load_lanes,
    make_dot,
    multiply_add,
    splat,
    splat_bits,
    splat_float,
    tail_mask,
)

BLOCK = 64  # keys between two looks at the maximum, at most
TILE_FLOATS = TOKEN_TILE * (BLOCK + ROW_TILE)  # scratch: scores of 4 rows, and a tile of 4 by 4 of them
LOWEST = np.float32(-np.inf)
POLYNOMIALS = [float(getattr(silu, f"POLYNOMIAL_{degree}")) for degree in range(6)]
LOWEST_POWER = splat_float(float(silu.ONE - silu.HIGHEST))
ACCUMULATORS = 16  # vectors; with 4 operands and a factor they fit 32 registers


class Queries(NamedTuple):
    """Rows of queries and their sums: addresses, float32. Their number is a multiple of 4."""

    values: int  # [rows, stride / 4]
    stride: int  # bytes from one row to the next
    weighted: int  # [rows, width of values rounded up to 16]
    weighted_stride: int
    maxima: int  # [rows]
    totals: int  # [rows]
    positions: int  # int64 [rows]: the last key that a row sees
    tiles: int  # scratch of TILE_FLOATS


class Keys(NamedTuple):
    """`size` keys and values, up to BLOCK, the first one at position `first`. Strides in bytes.

    Keys are rows of `width` values; or, where they are float32, columns of `width` rows if `columns`.
    """

    keys: int
    stride: int
    width: int
    columns: int
    values: int
    value_stride: int
    value_width: int
    first: int
    size: int
    code: int  # F32_CODE or BF16_CODE


def make_weigh(code: int, rows: int) -> Any:
    """Intrinsic: targets[t][: k] (+)= sum over n < count of shares[t, n] times source row n.

    weigh(sources, stride, count, shares, shares_stride, targets, k, keep): address of the first source row and bytes
    from one to the next; of float32 shares and bytes from one target's to the next's; addresses of `rows` targets,
    float32 of k values rounded up to 16, to which the sums are added if `keep`. Each sum runs in the order of n.
    """

    @intrinsic
    def weigh(typingctx, sources, stride, count, shares, shares_stride, targets, k, keep):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_weigh(builder, code, rows, args)
            return context.get_dummy_value()

        target_type = types.UniTuple(types.int64, rows)
        return types.void(*(types.int64,) * 5, target_type, types.int64, types.int64), codegen

    return weigh


def _emit_weigh(builder: Any, code: int, rows: int, args: Any) -> None:
    """ACCUMULATORS / rows vectors of each target at a time; what is left of k, one vector at a time."""
    *rest, targets_arg, k, keep = args
    targets = [builder.extract_value(targets_arg, t) for t in range(rows)]
    wide = LANES * ACCUMULATORS // rows
    whole = builder.and_(k, i64(-wide))

    def columns(vectors: int) -> Callable[[Any, list[Any]], list[Any]]:
        def emit(at: Any, _: list[Any]) -> list[Any]:
            mask = None if vectors > 1 else tail_mask(builder, builder.sub(k, at))
            _emit_columns(
                builder, code, rest, [_offset(builder, target, at, 4) for target in targets], at, vectors, mask, keep
            )
            return []

        return emit

    counted_loop(builder, i64(0), whole, wide, [], columns(ACCUMULATORS // rows))
    counted_loop(builder, whole, k, LANES, [], columns(1))


def _emit_columns(
    builder: Any, code: int, rest: list[Any], targets: list[Any], at: Any, vectors: int, mask: Any, keep: Any
) -> None:
    """Columns `at` to at + 16 vectors of all targets."""
    sources, stride, count, shares, shares_stride = rest
    first = _offset(builder, sources, at, 4 >> code)
    places = [builder.add(target, i64(4 * LANES * v)) for target in targets for v in range(vectors)]
    kept = builder.icmp_signed("!=", keep, i64(0))
    before = [builder.select(kept, load_lanes(builder, place, F32, None), splat_float(0.0)) for place in places]

    def step(n: Any, sums: list[Any]) -> list[Any]:
        row = builder.add(first, builder.mul(n, stride))
        values = []
        for v in range(vectors):
            stored = load_lanes(builder, builder.add(row, i64(LANES * (4 >> code) * v)), STORED[code], mask)
            values.append(_decode(builder, code, stored, None))
        after = []
        for t in range(len(targets)):
            share = builder.add(builder.add(shares, builder.mul(shares_stride, i64(t))), builder.shl(n, i64(2)))
            loaded = builder.load(builder.inttoptr(share, POINTER), typ=F32)
            loaded.align = 4
            factor = splat(builder, loaded, VF)
            after += [multiply_add(builder, factor, values[v], sums[t * vectors + v]) for v in range(vectors)]
        return after

    sums = counted_loop(builder, i64(0), count, 1, before, step)
    for place, total in zip(places, sums, strict=True):
        builder.store(total, builder.inttoptr(place, POINTER)).align = 4


def counted_loop(
    builder: Any, begin: Any, end: Any, by: int, state: list[Any], step: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """Run step(at, state) for at = begin, begin + by, ... below `end`; the last state."""
    entry = builder.block
    head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    at, now = builder.phi(I64), [builder.phi(value.type) for value in state]
    builder.cbranch(builder.icmp_signed("<", at, end), body, done)
    builder.position_at_end(body)
    following = [builder.add(at, i64(by)), *step(at, now)]
    for phi, first, later in zip([at, *now], [begin, *state], following, strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(later, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return now


def make_transpose(code: int) -> Any:
    """Intrinsic transpose(source, stride, target, target_stride): 16 rows of 16 values as float32 columns."""

    @intrinsic
    def transpose(typingctx, source, stride, target, target_stride):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_transpose(builder, code, args)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 4), codegen

    return transpose


def _emit_transpose(builder: Any, code: int, args: Any) -> None:
    """Swap each bit of the row's number with that of the lane's."""
    source, stride, target, target_stride = args
    rows = []
    for r in range(LANES):
        stored = load_lanes(builder, builder.add(source, builder.mul(stride, i64(r))), STORED[code], None)
        rows.append(_decode(builder, code, stored, None))
    for bit in (1, 2, 4, 8):
        low = ir.Constant(VI, [lane if not lane & bit else LANES + lane - bit for lane in range(LANES)])
        high = ir.Constant(VI, [lane + bit if not lane & bit else LANES + lane for lane in range(LANES)])
        for r in range(LANES):
            if not r & bit:
                pair = rows[r], rows[r + bit]
                rows[r], rows[r + bit] = (builder.shuffle_vector(*pair, mask) for mask in (low, high))
    for r, row in enumerate(rows):
        place = builder.add(target, builder.mul(target_stride, i64(r)))
        builder.store(row, builder.inttoptr(place, POINTER)).align = 4


_transpose_f32, _transpose_bf16 = (make_transpose(code) for code in (F32_CODE, BF16_CODE))
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
def weigh(code, sources, stride, count, shares, shares_stride, targets, k, keep):  # type: ignore[no-untyped-def]
    """Four targets become (keep: grow by) the sums of `count` source rows, each weighted (make_weigh)."""
    if code == BF16_CODE:
        _weigh_bf16(sources, stride, count, shares, shares_stride, targets, k, keep)
    else:
        _weigh_f32(sources, stride, count, shares, shares_stride, targets, k, keep)


@inner
def weigh_one(code, sources, stride, count, shares, target, k):  # type: ignore[no-untyped-def]
    """The same for one target, from zero."""
    if code == BF16_CODE:
        _weigh_one_bf16(sources, stride, count, shares, 0, (target,), k, 0)
    else:
        _weigh_one_f32(sources, stride, count, shares, 0, (target,), k, 0)


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
def copy_columns(source, code, stride, rows, width, readable, target, target_stride):  # type: ignore[no-untyped-def]
    """Float32 columns at `target` of the first `rows` of `readable` rows of `width` values."""
    for row in range(0, rows, LANES):
        for first in range(0, width, LANES):
            place = source + row * stride + first * (4 >> code)
            column = target + first * target_stride + row * 4
            if row + LANES > readable or first + LANES > width:
                _copy_corner(
                    place, code, stride, min(LANES, rows - row), min(LANES, width - first), column, target_stride
                )
            elif code == BF16_CODE:
                _transpose_bf16(place, stride, column, target_stride)
            else:
                _transpose_f32(place, stride, column, target_stride)


@inner
def _copy_corner(source, code, stride, rows, width, target, target_stride):  # type: ignore[no-untyped-def]
    for row in range(rows):
        for index in range(width):
            column = floats(target + index * target_stride, (rows,))
            if code == BF16_CODE:
                column[row] = get(halves(source + row * stride, (width,)), index)
            else:
                column[row] = floats(source + row * stride, (width,))[index]


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
    """Scores [4, BLOCK] of 4 query rows and the first `count` keys; what follows them is not meant."""
    if keys.columns:
        targets = strided_inputs(queries.tiles, BLOCK * 4, TOKEN_TILE)
        values = queries.values + row * queries.stride
        weigh(F32_CODE, keys.keys, keys.stride, keys.width, values, queries.stride, targets, padded(count), 0)
        return
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


@intrinsic
def _largest_of(typingctx, scores, count, largest):  # type: ignore[no-untyped-def]
    """The largest of `count` (a multiple of 16) float32 at `scores` and of `largest`. NaN is passed over."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, count, largest = args

        def step(at: Any, state: list[Any]) -> list[Any]:
            values = load_lanes(builder, _offset(builder, scores, at, 4), F32, None)
            return [builder.select(builder.fcmp_ordered(">", values, state[0]), values, state[0])]

        (lanes,) = counted_loop(builder, i64(0), count, LANES, [splat(builder, largest, VF)], step)
        return _folded(builder, lanes, lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))

    return types.float32(types.int64, types.int64, types.float32), codegen


def _folded(builder: Any, lanes: Any, join: Callable[[Any, Any], Any]) -> Any:
    """The 16 lanes joined into one: halves with each other, then quarters, ..."""
    for half in (8, 4, 2, 1):
        other = ir.Constant(VI, [lane ^ half for lane in range(LANES)])
        lanes = join(builder.shuffle_vector(lanes, lanes, other), lanes)
    return builder.extract_element(lanes, ir.Constant(I32, 0))


@intrinsic
def _powers_of(typingctx, scores, count, largest):  # type: ignore[no-untyped-def]
    """Turn `count` (a multiple of 16) float32 at `scores`, none above `largest`, into exp(score - largest); their sum.

    What is below 1e-37 becomes 0; NaN stays.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, count, largest = args
        most = splat(builder, largest, VF)

        def step(at: Any, state: list[Any]) -> list[Any]:
            place = _offset(builder, scores, at, 4)
            distance = builder.fsub(load_lanes(builder, place, F32, None), most)
            share = builder.select(builder.fcmp_ordered("<", distance, LOWEST_POWER), splat_float(0.0), distance)
            share = builder.select(
                builder.fcmp_ordered(">=", distance, LOWEST_POWER), _emit_exp(builder, distance), share
            )
            builder.store(share, builder.inttoptr(place, POINTER)).align = 4
            return [builder.fadd(state[0], share)]

        (total,) = counted_loop(builder, i64(0), count, LANES, [splat_float(0.0)], step)
        return _folded(builder, total, builder.fadd)

    return types.float32(types.int64, types.int64, types.float32), codegen


# The Python signatures of intrinsics have one argument more than their callers give.
_largest: Any = _largest_of
_powers: Any = _powers_of


def _emit_exp(builder: Any, x: Any) -> Any:
    """silu.exp of 16 values from LOWEST_POWER to 0; of others, anything."""
    bounded = builder.select(builder.fcmp_ordered(">", x, LOWEST_POWER), x, LOWEST_POWER)
    shifted = builder.fadd(builder.fmul(bounded, splat_float(float(silu.LOG2_E))), splat_float(128.5))
    power = builder.sub(builder.fptosi(shifted, VI), splat_bits(128))
    whole = builder.sitofp(power, VF)
    rest = builder.fsub(bounded, builder.fmul(whole, splat_float(float(silu.LN2_HIGH))))
    rest = builder.fsub(rest, builder.fmul(whole, splat_float(float(silu.LN2_LOW))))
    value = splat_float(POLYNOMIALS[0])
    for factor in POLYNOMIALS[1:]:
        value = multiply_add(builder, value, rest, splat_float(factor))
    value = builder.fadd(builder.fadd(builder.fmul(builder.fmul(value, rest), rest), rest), splat_float(1.0))
    two_to_power = builder.bitcast(builder.shl(builder.add(power, splat_bits(127)), splat_bits(23)), VF)
    return builder.fmul(value, two_to_power)


@inner
def _soften(queries, number, visible, most, row, width):  # type: ignore[no-untyped-def]
    """Turn scores `number` of a tile, those of `row`, into shares, 0 from `visible` on; the row's sums keep up."""
    place, count = queries.tiles + number * BLOCK * 4, padded(most)
    scores = floats(place, (BLOCK,))
    if visible == 0:
        scores[:count] = 0
        return
    scores[visible:count] = LOWEST
    maxima, totals = floats(queries.maxima, (row + 1,)), floats(queries.totals, (row + 1,))
    largest = _largest(place, count, maxima[row])
    if largest > maxima[row]:
        shrink = exp(maxima[row] - largest) if totals[row] != 0 else np.float32(0)
        weighted = floats(queries.weighted + row * queries.weighted_stride, (width,))
        for index in range(width):
            weighted[index] *= shrink
        totals[row] *= shrink
        maxima[row] = largest
    totals[row] += _powers(place, count, largest)


@inner
def _visible(queries, row, keys):  # type: ignore[no-untyped-def]
    """How many of the keys a row sees."""
    return max(0, min(keys.size, integers(queries.positions, (row + 1,))[row] + 1 - keys.first))


@inner
def attend_tile(queries, row, keys):  # type: ignore[no-untyped-def]
    """Let 4 rows of queries, from `row` on, see a block of keys and values."""
    most = 0
    for number in range(TOKEN_TILE):
        most = max(most, _visible(queries, row + number, keys))
    if most == 0:
        return
    _score(queries, row, keys, most)
    for number in range(TOKEN_TILE):
        visible = _visible(queries, row + number, keys)
        _soften(queries, number, visible, most, row + number, keys.value_width)
    targets = strided_inputs(queries.weighted + row * queries.weighted_stride, queries.weighted_stride, TOKEN_TILE)
    shares = queries.tiles
    weigh(keys.code, keys.values, keys.value_stride, most, shares, BLOCK * 4, targets, keys.value_width, 1)


@inner
def finish(queries, row, width):  # type: ignore[no-untyped-def]
    """Divide a row's weighted sum by its total."""
    weighted = floats(queries.weighted + row * queries.weighted_stride, (width,))
    total = floats(queries.totals, (row + 1,))[row]
    for index in range(width):
        weighted[index] /= total
    return weighted

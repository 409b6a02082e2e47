"""Sixteen float32 as one value in kernels: `Lanes`, with + - * / and a few functions, each rounded as in NumPy.

LLVM splits it into what the processor has (one AVX-512, two AVX2, four SSE or NEON registers). Products and sums stay
apart, so that results are the same everywhere.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from quant.kernels.vector import I32, I64, LANES, POINTER, VF, VI

_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic
_overload: Callable[[Any], Callable[[Any], Any]] = overload


class Lanes(types.Type):
    """Numba's type of the sixteen values."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, VF)


def _define_operator(function: Any, instruction: str) -> None:
    @_intrinsic
    def emit(context, a, b):  # type: ignore[no-untyped-def]
        return lanes(lanes, lanes), lambda _, builder, __, args: getattr(builder, instruction)(*args)

    @_overload(function)
    def typed(a, b):  # type: ignore[no-untyped-def]
        both = isinstance(a, Lanes) and isinstance(b, Lanes)
        return (lambda a, b: emit(a, b)) if both else None


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_function, _instruction)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(VI, [value] * LANES)


@_intrinsic
def load(context, address):  # type: ignore[no-untyped-def]
    """The 16 float32 at `address`, one after the other."""

    def emit(_, builder, __, args):  # type: ignore[no-untyped-def]
        loaded = builder.load(builder.inttoptr(args[0], POINTER), typ=VF)
        loaded.align = 4
        return loaded

    return lanes(types.int64), emit


@_intrinsic
def fill(context, value):  # type: ignore[no-untyped-def]
    """A float32 in all lanes."""

    def emit(_, builder, __, args):  # type: ignore[no-untyped-def]
        undefined = ir.Constant(VF, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(I32, 0))
        return builder.shuffle_vector(first, undefined, _constant(0))

    return lanes(types.float32), emit


@_intrinsic
def store(context, address, value):  # type: ignore[no-untyped-def]
    """Write 16 float32, or what bits they hold, to `address`."""

    def emit(_, builder, __, args):  # type: ignore[no-untyped-def]
        builder.store(args[1], builder.inttoptr(args[0], POINTER)).align = 4

    return types.void(types.int64, lanes), emit


@_intrinsic
def join_bits(context, word, value, mask, shift):  # type: ignore[no-untyped-def]
    """The bits of `word`, and those of the whole part of `value` (0 or more) that are in `mask`, `shift` higher."""

    def emit(_, builder, __, args):  # type: ignore[no-untyped-def]
        word, value, mask, shift = args
        bits = builder.and_(builder.fptosi(value, VI), _spread(builder, mask))
        moved = builder.shl(bits, _spread(builder, shift))
        return builder.bitcast(builder.or_(builder.bitcast(word, VI), moved), VF)

    return lanes(lanes, lanes, types.int64, types.int64), emit


def _spread(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(VI, ir.Undefined)
    first = builder.insert_element(undefined, builder.trunc(value, I32), ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, _constant(0))


@_intrinsic
def transpose(context, source, stride, target):  # type: ignore[no-untyped-def]
    """Write 16 x 16 float32, whose rows are `stride` bytes apart, to `target`: column by column, no gaps."""

    def emit(_, builder, __, args):  # type: ignore[no-untyped-def]
        source, stride, target = args
        rows = []
        for r in range(LANES):
            address = builder.add(source, builder.mul(stride, ir.Constant(I64, r)))
            loaded = builder.load(builder.inttoptr(address, POINTER), typ=VF)
            loaded.align = 4
            rows.append(loaded)
        for c, column in enumerate(_transposed(builder, rows)):
            address = builder.add(target, ir.Constant(I64, 4 * LANES * c))
            builder.store(column, builder.inttoptr(address, POINTER)).align = 4

    return types.void(types.int64, types.int64, types.int64), emit


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Swap squares of 8 x 8, then of 4 x 4, 2 x 2 and single values beside the diagonal."""
    for half in (8, 4, 2, 1):
        upper = [lane + LANES - half if lane & half else lane for lane in range(LANES)]
        lower = [lane + LANES if lane & half else lane + half for lane in range(LANES)]
        for r in [row for row in range(LANES) if not row & half]:
            pair = rows[r], rows[r + half]
            rows[r], rows[r + half] = (
                builder.shuffle_vector(*pair, ir.Constant(VI, chosen)) for chosen in (upper, lower)
            )
    return rows


def _make_bitwise(emit: Callable[[Any, Any], Any]) -> Any:
    @_intrinsic
    def bitwise(context, value):  # type: ignore[no-untyped-def]
        def convert(_, builder, __, args):  # type: ignore[no-untyped-def]
            return builder.bitcast(emit(builder, builder.bitcast(args[0], VI)), VF)

        return lanes(lanes), convert

    return bitwise


def _nearest_bf16(builder: Any, bits: Any) -> Any:
    is_odd = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
    rounded = builder.add(builder.add(bits, _constant(0x7FFF)), is_odd)
    return builder.and_(rounded, _constant(0xFFFF0000))


@_intrinsic
def where_less(context, a, b, yes, no):  # type: ignore[no-untyped-def]
    """`yes` in the lanes where a < b, `no` in the others."""

    def emit(_, builder, __, args):  # type: ignore[no-untyped-def]
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return lanes(lanes, lanes, lanes, lanes), emit


magnitude = _make_bitwise(lambda builder, bits: builder.and_(bits, _constant(0x7FFFFFFF)))
power_below = _make_bitwise(lambda builder, bits: builder.and_(bits, _constant(0x7F800000)))  # 2^e; 0 if subnormal
nearest_bf16 = _make_bitwise(_nearest_bf16)  # halves to even

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

from quant.kernels.vector import I8, I16, I32, LANES, POINTER, VF, VI

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


def _make_store(convert: Callable[[Any, Any], Any], alignment: int) -> Any:
    @_intrinsic
    def store(context, address, value):  # type: ignore[no-untyped-def]
        def emit(_, builder, __, args):  # type: ignore[no-untyped-def]
            stored = builder.store(convert(builder, args[1]), builder.inttoptr(args[0], POINTER))
            stored.align = alignment

        return types.void(types.int64, lanes), emit

    return store


def _to_bytes(builder: Any, value: Any) -> Any:
    return builder.trunc(builder.fptosi(value, VI), ir.VectorType(I8, LANES))


def _upper_halves(builder: Any, value: Any) -> Any:
    return builder.trunc(builder.lshr(builder.bitcast(value, VI), _constant(16)), ir.VectorType(I16, LANES))


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


store = _make_store(lambda builder, value: value, 4)  # (address, lanes): 16 float32
store_bytes = _make_store(_to_bytes, 1)  # whole numbers 0..255
store_bf16 = _make_store(_upper_halves, 2)  # values that bfloat16 holds exactly
magnitude = _make_bitwise(lambda builder, bits: builder.and_(bits, _constant(0x7FFFFFFF)))
power_below = _make_bitwise(lambda builder, bits: builder.and_(bits, _constant(0x7F800000)))  # 2^e; 0 if subnormal
nearest_bf16 = _make_bitwise(_nearest_bf16)  # halves to even

"""silu(gate) * up, between the two halves of an expert."""

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from quant.kernels.jit import inner
from quant.kernels.vector import (
    F32,
    POINTER,
    VF,
    VI,
    float_of_bits,
    load_lanes,
    splat_bits,
    splat_float,
)

ONE, HIGHEST, LOG2_E = np.float32(1), np.float32(88.37), np.float32(1.44269504)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
POLYNOMIAL_0, POLYNOMIAL_1, POLYNOMIAL_2, POLYNOMIAL_3, POLYNOMIAL_4, POLYNOMIAL_5 = (
    np.float32(c) for c in (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665795e-2, 1.6666665e-1, 5.0e-1)
)


@inner
def exp(x):  # type: ignore[no-untyped-def]
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
def silu_times(gates, ups):  # type: ignore[no-untyped-def]
    """gates = silu(gates) * ups, for float32 arrays of one size."""
    for index in range(gates.size):
        gate = gates[index]
        gates[index] = gate / (ONE + exp(-gate)) * ups[index]


def _exp_lanes(builder: Any, x: Any) -> Any:
    """`exp` of 16 float32, operation by operation."""
    highest, lowest = splat_float(float(HIGHEST)), splat_float(float(-HIGHEST + ONE))
    above = builder.fcmp_ordered(">", x, highest)
    bounded = builder.select(above, highest, builder.select(builder.fcmp_ordered(">", x, lowest), x, lowest))
    shifted = builder.fadd(builder.fmul(bounded, splat_float(float(LOG2_E))), splat_float(128.5))
    power = builder.sub(builder.fptosi(shifted, VI), splat_bits(128))
    whole = builder.sitofp(power, VF)
    rest = builder.fsub(bounded, builder.fmul(whole, splat_float(float(LN2_HIGH))))
    rest = builder.fsub(rest, builder.fmul(whole, splat_float(float(LN2_LOW))))
    value = splat_float(float(POLYNOMIAL_0))
    for coefficient in (POLYNOMIAL_1, POLYNOMIAL_2, POLYNOMIAL_3, POLYNOMIAL_4, POLYNOMIAL_5):
        value = builder.fadd(builder.fmul(value, rest), splat_float(float(coefficient)))
    value = builder.fadd(builder.fadd(builder.fmul(builder.fmul(value, rest), rest), rest), splat_float(1.0))
    scale = builder.bitcast(builder.shl(builder.add(power, splat_bits(127)), splat_bits(23)), VF)
    return builder.select(above, splat_float(float("inf")), builder.fmul(value, scale))


@intrinsic
def _silu_lanes(typingctx, gates, ups, out):  # type: ignore[no-untyped-def]
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        gate, up = (load_lanes(builder, address, F32, None) for address in args[:2])
        share = builder.fdiv(
            gate, builder.fadd(splat_float(1.0), _exp_lanes(builder, builder.fsub(splat_float(-0.0), gate)))
        )
        builder.store(builder.fmul(share, up), builder.inttoptr(args[2], POINTER)).align = 4
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 3), codegen


# The Python signature of an intrinsic has one argument more than its callers give.
silu_lanes: Any = _silu_lanes  # (gates, ups, out): addresses of 16 float32 each; out = silu(gates) * ups

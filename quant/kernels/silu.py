"""silu(gate) * up, between the two halves of an expert."""

import numpy as np

from quant.kernels.jit import inner
from quant.kernels.vector import float_of_bits

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

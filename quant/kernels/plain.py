"""Activations as the model keeps them, float32 or bfloat16, in kernels that compute in float32.

Codes are F32_CODE and BF16_CODE of vector.py. Functions take arrays of float32, or of uint16 that hold bfloat16 bits.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from quant.kernels.jit import inner
from quant.kernels.vector import float_of_bits, pointer

_overload: Callable[[Any], Callable[[Any], Any]] = overload

# For sums whose order the compiler may choose: it is the same for every row, whatever the number of rows and threads.
inner_sum: Callable[[Callable[..., Any]], Any] = numba.njit(
    nogil=True, error_model="numpy", fastmath={"reassoc", "contract"}
)


@inner
def halves(address, shape):  # type: ignore[no-untyped-def]
    """The array of `shape` of bfloat16 bits at `address`."""
    return numba.carray(pointer(address), shape, np.uint16)


@inner
def bits_of(value):  # type: ignore[no-untyped-def]
    """The bits of a float32."""
    return np.float32(value).view(np.uint32)


@inner
def bf16_bits(value):  # type: ignore[no-untyped-def]
    """The nearest bfloat16, halves to even."""
    bits = bits_of(value)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.uint16(rounded if value == value else quiet)


def get(stored: Any, index: int) -> float:
    """stored[index] as float32. For kernels only."""
    raise NotImplementedError


def put(stored: Any, index: int, value: float) -> None:
    """stored[index] = value, rounded. For kernels only."""
    raise NotImplementedError


@_overload(get)
def _get(stored, index):  # type: ignore[no-untyped-def]
    if stored.dtype == types.uint16:
        return lambda stored, index: float_of_bits(np.int32(np.uint32(stored[index]) << np.uint32(16)))
    return lambda stored, index: stored[index]


@_overload(put)
def _put(stored, index, value):  # type: ignore[no-untyped-def]
    if stored.dtype == types.uint16:

        def put_half(stored, index, value):  # type: ignore[no-untyped-def]
            stored[index] = bf16_bits(value)

        return put_half

    def put_whole(stored, index, value):  # type: ignore[no-untyped-def]
        stored[index] = value

    return put_whole

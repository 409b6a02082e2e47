"""Steps that change values one by one, or move them."""

import numpy as np

from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner
from quant.kernels.plain import get, halves, put
from quant.kernels.silu import exp
from quant.kernels.tiles import floats, share
from quant.kernels.vector import BF16_CODE

ONE = np.float32(1)
GRAIN = 64  # values: threads share out whole cache lines


@inner
def _range(count, part, parts):  # type: ignore[no-untyped-def]
    first, end = share((count + GRAIN - 1) // GRAIN, part, parts)
    return first * GRAIN, min(end * GRAIN, count)


@inner
def _copy(source, target):  # type: ignore[no-untyped-def]
    for index in range(target.size):
        put(target, index, get(source, index))


def _convert(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """Values in the other dtype. Arguments: addresses of source and target, count, the source's code."""
    source, target, count, code = arguments_of(arguments, 4)
    first, end = _range(count, part, parts)
    if code == BF16_CODE:
        _copy(halves(source + first * 2, (end - first,)), floats(target + first * 4, (end - first,)))
    else:
        _copy(floats(source + first * 4, (end - first,)), halves(target + first * 2, (end - first,)))
    return 0


def _copy_rows(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """Arguments: addresses of source and target, rows, bytes of a row (even), and from row to row of either."""
    source, target, rows, width, source_stride, target_stride = arguments_of(arguments, 6)
    first, end = share(rows, part, parts)
    for row in range(first, end):
        halves(target + row * target_stride, (width // 2,))[:] = halves(source + row * source_stride, (width // 2,))
    return 0


@inner
def _sum(a, b, out):  # type: ignore[no-untyped-def]
    for index in range(out.size):
        put(out, index, get(a, index) + get(b, index))


def _add(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """out = a + b. Arguments: their addresses (a, b, out), count and code."""
    a, b, out, count, code = arguments_of(arguments, 5)
    first, end = _range(count, part, parts)
    size, skip = end - first, first * (4 >> code)
    if code == BF16_CODE:
        _sum(halves(a + skip, (size,)), halves(b + skip, (size,)), halves(out + skip, (size,)))
    else:
        _sum(floats(a + skip, (size,)), floats(b + skip, (size,)), floats(out + skip, (size,)))
    return 0


@inner
def _gate(gates, ups, out):  # type: ignore[no-untyped-def]
    for index in range(out.size):
        gate = get(gates, index)
        put(out, index, gate / (ONE + exp(-gate)) * get(ups, index))


def _silu_times(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """out = silu(gates) * ups. Arguments: their addresses (gates, ups, out), count and code."""
    gates, ups, out, count, code = arguments_of(arguments, 5)
    first, end = _range(count, part, parts)
    size, skip = end - first, first * (4 >> code)
    if code == BF16_CODE:
        _gate(halves(gates + skip, (size,)), halves(ups + skip, (size,)), halves(out + skip, (size,)))
    else:
        _gate(floats(gates + skip, (size,)), floats(ups + skip, (size,)), floats(out + skip, (size,)))
    return 0


convert, copy_rows, add, silu_times = (Kernel(function) for function in (_convert, _copy_rows, _add, _silu_times))

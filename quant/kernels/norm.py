"""Root-mean-square norm of rows."""

import numpy as np

from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner
from quant.kernels.plain import get, halves, inner_sum, put
from quant.kernels.tiles import floats, share
from quant.kernels.vector import BF16_CODE, float_of_bits

ONE = np.float32(1)


@inner_sum
def _sum_of_squares(x):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for index in range(x.size):
        value = get(x, index)
        total += value * value
    return total


@inner
def _norm(x, weight, eps, out):  # type: ignore[no-untyped-def]
    factor = ONE / np.sqrt(_sum_of_squares(x) / np.float32(x.size) + eps)
    for index in range(x.size):
        put(out, index, get(x, index) * factor * weight[index])


@inner
def _norm_share(x, weight, out, rows, dim, stride, out_stride, code, eps, part, parts):  # type: ignore[no-untyped-def]
    scale, epsilon = floats(weight, (dim,)), float_of_bits(np.int32(eps))
    first, end = share(rows, part, parts)
    for row in range(first, end):
        if code == BF16_CODE:
            _norm(halves(x + row * stride, (dim,)), scale, epsilon, halves(out + row * out_stride, (dim,)))
        else:
            _norm(floats(x + row * stride, (dim,)), scale, epsilon, floats(out + row * out_stride, (dim,)))


def _rms_norm(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """out [rows, dim] = x / sqrt(mean(x * x) + eps) * weight, row by row. Arguments: those of _norm_share.

    x, weight, out: addresses. Strides: bytes from row to row. code: of x and out. eps: float32 bits.
    """
    x, weight, out, rows, dim, stride, out_stride, code, eps = arguments_of(arguments, 9)
    _norm_share(x, weight, out, rows, dim, stride, out_stride, code, eps, part, parts)
    return 0


rms_norm = Kernel(_rms_norm)

"""Rows as a checkpoint publishes them, in FP8, bfloat16 or float32, as float32: what encoders read."""

from quant.formats import FP8_BLOCK_SIDE
from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner
from quant.kernels.vector import BF16_CODE, F32_CODE, FP8_CODE, LANES, make_decode

SPARE_VALUES = LANES - 1  # that may be written after the result

_decode_f32, _decode_bf16, _decode_fp8 = (make_decode(code) for code in (F32_CODE, BF16_CODE, FP8_CODE))


@inner
def widen_row(stored, scales, row, column, count, k, code, out):  # type: ignore[no-untyped-def]
    """Write `count` values of a row of a matrix [.., k], from a column on that is a multiple of 128, to `out`.

    Up to SPARE_VALUES more are written after them. stored, scales: addresses of the matrix and of its scales, which
    FP8 alone has: float32 [.. / 128, k / 128].
    """
    source = stored + (row * k + column) * (4 >> code)
    if code == FP8_CODE:
        blocks = (k + FP8_BLOCK_SIDE - 1) // FP8_BLOCK_SIDE
        _decode_fp8(source, scales + (row // FP8_BLOCK_SIDE * blocks + column // FP8_BLOCK_SIDE) * 4, count, out)
    elif code == BF16_CODE:
        _decode_bf16(source, scales, count, out)
    else:
        _decode_f32(source, scales, count, out)


def _widen(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """float32 [rows, k] = stored rows that follow each other, times their scales; for one thread.

    Arguments: addresses of the rows, of the scales (of FP8: float32 [rows / 128, k / 128]) and of the result, which has
    room for SPARE_VALUES more; rows, k, code.
    """
    stored, scales, out, rows, k, code = arguments_of(arguments, 6)
    for row in range(rows):
        widen_row(stored, scales, row, 0, k, k, code, out + row * k * 4)
    return 0


widen = Kernel(_widen)

"""Rows as a checkpoint publishes them, in FP8 or bfloat16, as float32: what the encoder reads."""

from quant.formats import FP8_BLOCK_SIDE
from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel
from quant.kernels.vector import BF16_CODE, FP8_CODE, LANES, make_decode

SPARE_VALUES = LANES - 1  # that may be written after the result

_decode_bf16, _decode_fp8 = (make_decode(code) for code in (BF16_CODE, FP8_CODE))


def _widen(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """float32 [rows, k] = stored rows that follow each other, times their scales; for one thread.

    Arguments: addresses of the rows, of the scales (of FP8: float32 [rows / 128, k / 128]) and of the result, which has
    room for SPARE_VALUES more; rows, k, code.
    """
    stored, scales, out, rows, k, code = arguments_of(arguments, 6)
    blocks = (k + FP8_BLOCK_SIDE - 1) // FP8_BLOCK_SIDE
    for row in range(rows):
        target = out + row * k * 4
        if code == FP8_CODE:
            _decode_fp8(stored + row * k, scales + row // FP8_BLOCK_SIDE * blocks * 4, k, target)
        else:
            _decode_bf16(stored + row * k * 2, scales, k, target)
    return 0


widen = Kernel(_widen)

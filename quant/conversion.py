"""Activations from float32 to bfloat16 and back, by a kernel: torch would wake threads of its own."""

import torch
from torch import Tensor

from quant.kernels.elementwise import convert
from quant.kernels.threads import parts_for
from quant.kernels.vector import BF16_CODE, F32_CODE
from quant.tape import call, empty, leave_to_torch

CODES = {torch.float32: F32_CODE, torch.bfloat16: BF16_CODE}
VALUE_COST = 8  # multiplications that take about as long as a value that is read, changed a little and written


def converted(x: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """x, on the host, in `dtype`; x itself if that is its dtype. `out`: contiguous, of x's shape, to be used for it."""
    if x.dtype == dtype:
        return x
    if {x.dtype, dtype} != set(CODES) or not x.is_contiguous():
        leave_to_torch(f"a conversion from {x.dtype} to {dtype}")
        return x.to(dtype)
    out = empty(*x.shape, dtype=dtype) if out is None else out
    arguments = (x.data_ptr(), out.data_ptr(), x.numel(), CODES[x.dtype])
    call(convert, arguments, parts_for(x.numel() * VALUE_COST))
    return out


def as_float32(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x, on the host, as contiguous float32; x itself if it is that. `out`: as in `converted`."""
    values = converted(x, torch.float32, out)
    if values.is_contiguous():
        return values
    leave_to_torch("a copy without gaps")
    return values.contiguous()

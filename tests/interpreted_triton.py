"""Mends Triton's interpreter for bfloat16, which it keeps as its bits.

Its matrix product takes these bits for integers, and its conversion from float32 cuts off what a GPU rounds.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TensorHandle = interpreter.TensorHandle
convert_otherwise = interpreter.InterpreterBuilder.cast_impl


def values(handle: Any) -> Any:
    """A tensor's numbers: of bfloat16, as float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def dot(self: Any, a: Any, b: Any, sums: Any, precision: Any, imprecise: Any) -> Any:
    """a @ b + sums as tensor cores have it: exact products, float32 sums."""
    product = np.matmul(values(a), values(b), dtype=np.float32)
    return TensorHandle(product + sums.data, sums.dtype.scalar)


def convert(self: Any, source: Any, target: Any) -> Any:
    """To the nearest bfloat16, halves to even."""
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(rounded.reshape(source.data.shape), tl.bfloat16)
    return convert_otherwise(self, source, target)


interpreter.InterpreterBuilder.create_dot = dot
interpreter.InterpreterBuilder.cast_impl = convert

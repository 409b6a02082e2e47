"""Packed matrices as plain float32, as a torch operator, so that a device's memory count sees the result."""

import torch
from torch import Tensor

from quant.formats import QuantTensor
from quant.gpu.reference import packed_weights
from quant.kernels.decode import PACKED_CODES, decode
from quant.kernels.threads import call, parts_for
from quant.packed import PACKED_FORMATS, PackedFormat

_library = torch.library.Library("dsr1", "FRAGMENT")
_library.define("dequantize(Tensor data, str format, int rows, int columns) -> Tensor")


def dequantize(weight: QuantTensor) -> Tensor:
    """The values of a matrix [N, K] in any format, float32."""
    if isinstance(weight.format, PackedFormat):
        values: Tensor = torch.ops.dsr1.dequantize.default(weight.data, weight.format.name, *weight.shape)
        return values
    return weight.dequantize(torch.float32)


def _check(data: Tensor, name: str, rows: int, columns: int) -> None:
    fmt = PACKED_FORMATS.get(name)
    if fmt is None or data.dtype != torch.uint8 or not data.is_contiguous() or rows < 1 or columns < 1:
        raise ValueError(f"no kernel decodes {data.dtype} of format {name!r}; give contiguous uint8 of a packed format")
    if data.numel() != fmt.nbytes((rows, columns)):
        raise ValueError(
            f"a matrix [{rows}, {columns}] takes {fmt.nbytes((rows, columns))} bytes as {name}, not {data.numel()}"
        )


def _dequantize_cpu(data: Tensor, name: str, rows: int, columns: int) -> Tensor:
    _check(data, name, rows, columns)
    out = torch.empty(rows, columns)
    sizes = (data.data_ptr(), out.data_ptr(), rows, columns, PACKED_CODES[name])
    call(decode, sizes, parts_for(rows * columns))
    return out


def _dequantize_fake(data: Tensor, name: str, rows: int, columns: int) -> Tensor:
    _check(data, name, rows, columns)
    return data.new_empty(rows, columns, dtype=torch.float32)


def _dequantize_cuda(data: Tensor, name: str, rows: int, columns: int) -> Tensor:
    _check(data, name, rows, columns)
    return packed_weights(data, PACKED_FORMATS[name], (rows, columns))


_library.impl("dequantize", _dequantize_cpu, "CPU")
_library.impl("dequantize", _dequantize_cuda, "CUDA")
torch.library.register_fake("dsr1::dequantize", _dequantize_fake, lib=_library)

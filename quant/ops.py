"""The CPU kernels as torch operators, so that fake tensors pass through them untouched.

An operator's CPU implementation checks dtypes, shapes and layout before a kernel reads memory; its fake one checks
the same and only tells the shape and dtype of the result. Neither has a gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.conversion import as_float32, converted
from quant.formats import FORMATS, Format, QuantTensor
from quant.gpu import ops as gpu
from quant.isa import has_tiles
from quant.kernels import linear as linear_kernel
from quant.kernels import moe, packed_linear, packed_moe
from quant.kernels.decode import PACKED_CODES
from quant.kernels.jit import Kernel
from quant.kernels.routing import order_integers
from quant.kernels.threads import parts_for, thread_count
from quant.kernels.vector import BF16_CODE, F32_CODE, FP8_CODE
from quant.packed import EXPERT_FORMATS, PACKED_FORMATS, PackedFormat
from quant.tape import call, empty, scratch

KERNELS: dict[torch.dtype, tuple[Format, int]] = {
    torch.float32: (FORMATS["f32"], F32_CODE),
    torch.bfloat16: (FORMATS["bf16"], BF16_CODE),
    torch.float8_e4m3fn: (FORMATS["fp8_block"], FP8_CODE),
}

_library = torch.library.Library("dsr1", "DEF")
_library.define("linear(Tensor x, Tensor data, Tensor? scale) -> Tensor")
_library.define("packed_linear(Tensor x, Tensor data, str format, int rows, int columns) -> Tensor")
for _name, _stored in (("moe_experts", "ScalarType weight_dtype"), ("packed_moe_experts", "str format")):
    _library.define(
        f"{_name}(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor table, int inter_dim, {_stored}, int nodes, "
        "Tensor(a!) order, Tensor(b!) scratch, Tensor(c!) out) -> ()"
    )


def linear(x: Tensor, weight: QuantTensor) -> Tensor:
    """x [..., K] of any float dtype times weight [N, K]: [..., N] in x's dtype, summed in float32.

    For a packed weight, x is rounded to 8 bits, with one scale for each 128 columns; on a GPU to bfloat16.
    """
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    out: Tensor
    if x.is_cuda:
        out = gpu.linear(rows, weight)
    elif isinstance(weight.format, PackedFormat):
        out = torch.ops.dsr1.packed_linear.default(rows, weight.data, weight.format.name, *weight.shape)
    else:
        out = torch.ops.dsr1.linear.default(rows, weight.data, weight.scale)
    return out if x.ndim == 2 else out.reshape(*x.shape[:-1], weight.shape[0])


def check_weight(data: Tensor, scale: Tensor | None) -> None:
    """Raise ValueError unless a kernel may read this weight: [N, K], contiguous, with the scales of its format."""
    if data.dtype not in KERNELS:
        raise ValueError(f"no kernel reads weights of {data.dtype}; there are kernels for {', '.join(FORMATS)}")
    fmt = KERNELS[data.dtype][0]
    if data.ndim != 2 or not data.is_contiguous():
        raise ValueError(f"a weight must be a contiguous matrix; this one is {_describe(data)}")
    if scale is None:
        if fmt.block is not None:
            raise ValueError(f"a weight of format {fmt.name} needs scales, and this one has none")
        return
    shape = fmt.scale_shape(data.shape)
    if scale.shape != shape or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(f"scales of this weight must be contiguous float32 of shape {shape}, not {_describe(scale)}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"


def _check_linear(x: Tensor, data: Tensor, scale: Tensor | None) -> None:
    check_weight(data, scale)
    if x.ndim != 2 or x.shape[1] != data.shape[1] or not x.is_floating_point():
        raise ValueError(f"x ({_describe(x)}) cannot be multiplied with a weight of shape {tuple(data.shape)}")
    if x.device != data.device or (scale is not None and scale.device != data.device):
        raise ValueError(f"x is on {x.device} and the weight on {data.device}; both must be on one device")


def _linear_cpu(x: Tensor, data: Tensor, scale: Tensor | None) -> Tensor:
    _check_linear(x, data, scale)
    (tokens, k), n = x.shape, data.shape[0]
    x32 = as_float32(x)
    out = empty(tokens, n)
    if out.numel():
        parts = parts_for(tokens * n * k)
        space = scratch(parts * linear_kernel.scratch_floats(k))
        scale_address = 0 if scale is None else scale.data_ptr()
        tensors = (x32.data_ptr(), data.data_ptr(), scale_address, out.data_ptr(), space.data_ptr())
        call(linear_kernel.linear, (*tensors, tokens, n, k, KERNELS[data.dtype][1]), parts)
    return converted(out, x.dtype)


def _linear_fake(x: Tensor, data: Tensor, scale: Tensor | None) -> Tensor:
    _check_linear(x, data, scale)
    return x.new_empty(x.shape[0], data.shape[0])


def check_packed(data: Tensor, name: str, shape: tuple[int, int]) -> PackedFormat:
    """The packed format `name`; ValueError unless a kernel may read `data` as a matrix of `shape` in it."""
    fmt = PACKED_FORMATS.get(name)
    if fmt is None:
        known = ", ".join(PACKED_FORMATS)
        raise ValueError(f"no kernel reads packed weights of format {name!r}; there are kernels for {known}")
    if data.dtype != torch.uint8 or not data.is_contiguous():
        raise ValueError(f"a packed weight must be contiguous uint8; this one is {_describe(data)}")
    if min(shape) < 1 or data.numel() != fmt.nbytes(shape):
        raise ValueError(f"a weight of shape {shape} takes {fmt.nbytes(shape)} bytes as {name}, not {data.numel()}")
    return fmt


def _check_packed_linear(x: Tensor, data: Tensor, name: str, rows: int, columns: int) -> None:
    check_packed(data, name, (rows, columns))
    if x.ndim != 2 or x.shape[1] != columns or not x.is_floating_point():
        raise ValueError(f"x ({_describe(x)}) cannot be multiplied with a weight of shape {(rows, columns)}")
    if x.device != data.device:
        raise ValueError(f"x is on {x.device} and the weight on {data.device}; both must be on one device")


def _packed_linear_cpu(x: Tensor, data: Tensor, name: str, n: int, k: int) -> Tensor:
    _check_packed_linear(x, data, name, n, k)
    tokens = x.shape[0]
    x32 = as_float32(x)
    out = empty(tokens, n)
    if tokens:
        parts = parts_for(tokens * n * k)
        space = scratch(packed_linear.scratch_bytes(tokens, k, parts), torch.uint8)
        addresses = (x32.data_ptr(), data.data_ptr(), out.data_ptr(), space.data_ptr())
        call(packed_linear.packed_linear, (*addresses, tokens, n, k, PACKED_CODES[name], int(has_tiles())), parts)
    return converted(out, x.dtype)


def _packed_linear_fake(x: Tensor, data: Tensor, name: str, rows: int, columns: int) -> Tensor:
    _check_packed_linear(x, data, name, rows, columns)
    return x.new_empty(x.shape[0], rows)


class MoeKernel(NamedTuple):
    """A kernel for the experts of a layer, and what it asks of its caller.

    codes: its numbers, of w1 and w3 and of w2, for each way in which weights may be stored: a dtype, or the name of a
    packed format or of two (ExpertRecord.format_name). more: what else it wants to know of a call.
    """

    run: Kernel
    table_columns: int
    scratch_floats: Callable[[int, int, int, int, int], int]
    codes: Mapping[Any, tuple[int, int]]
    most_nodes: int
    more: Callable[["MoeCall"], tuple[int, ...]]


class MoeCall(NamedTuple):
    """Arguments of `dsr1::moe_experts` and `dsr1::packed_moe_experts`: out = the weighted sum over a token's experts.

    All tensors are on the CPU; `table` holds addresses, which must stay valid. order and scratch: moe_scratch_sizes.
    """

    x: Tensor  # float32 [T, dim]
    topk_ids: Tensor  # int64 [T, K]; -1 for a pair that is left out
    topk_weights: Tensor  # float32 [T, K]
    table: Tensor  # int64 [E, 6]: addresses of w1, w3, w2 and of their scales; packed: [E, 3], w1, w3, w2
    inter_dim: int
    stored: torch.dtype | str  # dtype of the weights, or name of their packed formats
    nodes: int  # NUMA nodes that share each packed matrix's rows: the table is one for each of them, [nodes * E, 3]
    order: Tensor  # int64, overwritten
    scratch: Tensor  # float32, overwritten
    out: Tensor  # float32 [T, dim], overwritten

    @property
    def experts(self) -> int:
        return self.table.shape[0] // self.nodes

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """T, K, dim and inter_dim."""
        return self.x.shape[0], self.topk_ids.shape[1], self.x.shape[1], self.inter_dim


PLAIN_MOE = MoeKernel(
    run=moe.moe_experts,
    table_columns=moe.TABLE_COLUMNS,
    scratch_floats=moe.scratch_floats,
    codes={dtype: (code, code) for dtype, (_, code) in KERNELS.items()},
    most_nodes=1,
    more=lambda layer: (1, 0),
)
PACKED_MOE = MoeKernel(
    run=packed_moe.packed_moe_experts,
    table_columns=packed_moe.TABLE_COLUMNS,
    scratch_floats=packed_moe.scratch_floats,
    codes={
        name: (PACKED_CODES[gate_up.name], PACKED_CODES[down.name]) for name, (gate_up, down) in EXPERT_FORMATS.items()
    },
    most_nodes=packed_moe.MOST_NODES,
    more=lambda layer: (layer.nodes, int(has_tiles())),
)

MOE_TENSORS = {
    "x": (torch.float32, 2),
    "topk_ids": (torch.int64, 2),
    "topk_weights": (torch.float32, 2),
    "table": (torch.int64, 2),
    "order": (torch.int64, 1),
    "scratch": (torch.float32, 1),
    "out": (torch.float32, 2),
}


def moe_scratch_sizes(tokens: int, top_k: int, experts: int, dim: int, inter_dim: int) -> tuple[int, int]:
    """Values of `order` and of `scratch` that either operator needs for up to `tokens` tokens with all threads."""
    sizes = (tokens, top_k, dim, inter_dim, thread_count())
    scratch = max(kernel.scratch_floats(*sizes) for kernel in (PLAIN_MOE, PACKED_MOE))
    return order_integers(tokens, top_k, experts), scratch


def _check_moe(kernel: MoeKernel, layer: MoeCall) -> None:
    for name, (dtype, ndim) in MOE_TENSORS.items():
        tensor: Tensor = getattr(layer, name)
        if tensor.dtype != dtype or tensor.ndim != ndim or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be a contiguous {dtype} of {ndim} dimensions on cpu, not {_describe(tensor)}"
            )
    chosen, tokens = layer.topk_ids.shape, layer.x.shape[0]
    if chosen != layer.topk_weights.shape or chosen[0] != tokens or layer.out.shape != layer.x.shape:
        shapes = [tuple(t.shape) for t in (layer.x, layer.topk_ids, layer.topk_weights, layer.out)]
        raise ValueError(f"x, topk_ids, topk_weights and out have shapes {shapes}, which do not fit together")
    if not 1 <= layer.nodes <= kernel.most_nodes or layer.table.shape[0] % layer.nodes:
        raise ValueError(f"a table of {layer.table.shape[0]} rows is not one of {layer.nodes} nodes for this kernel")
    if layer.table.shape[1] != kernel.table_columns or layer.inter_dim < 1 or layer.stored not in kernel.codes:
        raise ValueError(
            f"no kernel runs experts of {layer.stored}, {layer.inter_dim} rows, {layer.table.shape[1]} addresses each"
        )


def _threads_that_fit(kernel: MoeKernel, layer: MoeCall) -> int:
    """How many threads the scratch buffer serves; less than 1 if a buffer is too small."""
    if layer.order.numel() < order_integers(layer.topk_ids.shape[0], layer.topk_ids.shape[1], layer.experts):
        return 0
    none, one = (kernel.scratch_floats(*layer.sizes, threads) for threads in (0, 1))
    return (layer.scratch.numel() - none) // (one - none)


def _run_moe(kernel: MoeKernel, layer: MoeCall) -> None:
    _check_moe(kernel, layer)
    (tokens, top_k, dim, inter), experts = layer.sizes, layer.experts
    fitting = _threads_that_fit(kernel, layer)
    if fitting < 1:
        raise ValueError(f"order and scratch are too small for {tokens} tokens; moe_scratch_sizes gives their sizes")
    parts = min(fitting, parts_for(3 * tokens * top_k * dim * inter))
    buffers = (layer.x, layer.topk_ids, layer.topk_weights, layer.table, layer.out, layer.order, layer.scratch)
    sizes = (tokens, top_k, experts, dim, inter, *kernel.codes[layer.stored], *kernel.more(layer))
    if not call(kernel.run, (*(buffer.data_ptr() for buffer in buffers), *sizes), parts):
        raise IndexError(f"topk_ids holds an expert outside -1 .. {experts - 1}")


_library.impl("linear", _linear_cpu, "CPU")
_library.impl("packed_linear", _packed_linear_cpu, "CPU")
torch.library.register_fake("dsr1::linear", _linear_fake, lib=_library)
torch.library.register_fake("dsr1::packed_linear", _packed_linear_fake, lib=_library)
for _name, _kernel in (("moe_experts", PLAIN_MOE), ("packed_moe_experts", PACKED_MOE)):
    _library.impl(_name, lambda *args, kernel=_kernel: _run_moe(kernel, MoeCall(*args)), "CPU")
    torch.library.register_fake(
        f"dsr1::{_name}", lambda *args, kernel=_kernel: _check_moe(kernel, MoeCall(*args)), lib=_library
    )

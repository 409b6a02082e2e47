"""The CPU kernels as torch operators, so that fake tensors pass through them untouched.

An operator's CPU implementation checks dtypes, shapes and layout before a kernel reads memory; its fake one checks
the same and only tells the shape and dtype of the result. Neither has a gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.formats import FORMATS, Format, QuantTensor
from quant.kernels import linear as linear_kernel
from quant.kernels import moe as moe_kernel
from quant.kernels.threads import call, parts_for, thread_count
from quant.kernels.vector import BF16_CODE, F32_CODE, FP8_CODE

KERNELS: dict[torch.dtype, tuple[Format, int]] = {
    torch.float32: (FORMATS["f32"], F32_CODE),
    torch.bfloat16: (FORMATS["bf16"], BF16_CODE),
    torch.float8_e4m3fn: (FORMATS["fp8_block"], FP8_CODE),
}

_library = torch.library.Library("dsr1", "DEF")
_library.define("linear(Tensor x, Tensor data, Tensor? scale) -> Tensor")
_library.define(
    "moe_experts(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor table, int inter_dim, ScalarType weight_dtype, "
    "Tensor(a!) order, Tensor(b!) scratch, Tensor(c!) out) -> ()"
)


def linear(x: Tensor, weight: QuantTensor) -> Tensor:
    """x [..., K] of any float dtype times weight [N, K]: [..., N] in x's dtype, summed in float32."""
    operator = torch.ops.dsr1.linear.default
    out: Tensor
    if x.ndim == 2:
        out = operator(x, weight.data, weight.scale)
        return out
    out = operator(x.reshape(-1, x.shape[-1]), weight.data, weight.scale)
    return out.reshape(*x.shape[:-1], weight.shape[0])


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
    x32 = x.to(torch.float32).contiguous()
    out = torch.empty(tokens, n)
    if out.numel():
        parts = parts_for(tokens * n * k)
        scratch = torch.empty(parts * linear_kernel.scratch_floats(k))
        scale_address = 0 if scale is None else scale.data_ptr()
        tensors = (x32.data_ptr(), data.data_ptr(), scale_address, out.data_ptr(), scratch.data_ptr())
        call(linear_kernel.linear, (*tensors, tokens, n, k, KERNELS[data.dtype][1]), parts)
    return out.to(x.dtype)


def _linear_fake(x: Tensor, data: Tensor, scale: Tensor | None) -> Tensor:
    _check_linear(x, data, scale)
    return x.new_empty(x.shape[0], data.shape[0])


class MoeCall(NamedTuple):
    """Arguments of `dsr1::moe_experts`: out = the weighted sum over each token's experts.

    All tensors are on the CPU; `table` holds addresses, which must stay valid. order and scratch: moe_scratch_sizes.
    """

    x: Tensor  # float32 [T, dim]
    topk_ids: Tensor  # int64 [T, K]
    topk_weights: Tensor  # float32 [T, K]
    table: Tensor  # int64 [E, 6]: addresses of w1, w3, w2 and of their scales
    inter_dim: int
    weight_dtype: torch.dtype
    order: Tensor  # int64, overwritten
    scratch: Tensor  # float32, overwritten
    out: Tensor  # float32 [T, dim], overwritten


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
    """Values of `order` and of `scratch` that dsr1::moe_experts needs for up to `tokens` tokens with all threads."""
    order = moe_kernel.order_integers(tokens, top_k, experts)
    hidden = moe_kernel.hidden_floats(tokens, top_k, inter_dim)
    return order, hidden + thread_count() * moe_kernel.part_floats(dim, inter_dim)


def _check_moe(moe: MoeCall) -> None:
    for name, (dtype, ndim) in MOE_TENSORS.items():
        tensor: Tensor = getattr(moe, name)
        if tensor.dtype != dtype or tensor.ndim != ndim or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be a contiguous {dtype} of {ndim} dimensions on cpu, not {_describe(tensor)}"
            )
    chosen, tokens = moe.topk_ids.shape, moe.x.shape[0]
    if chosen != moe.topk_weights.shape or chosen[0] != tokens or moe.out.shape != moe.x.shape:
        shapes = [tuple(t.shape) for t in (moe.x, moe.topk_ids, moe.topk_weights, moe.out)]
        raise ValueError(f"x, topk_ids, topk_weights and out have shapes {shapes}, which do not fit together")
    if moe.table.shape[1] != moe_kernel.TABLE_COLUMNS or moe.inter_dim < 1 or moe.weight_dtype not in KERNELS:
        raise ValueError(
            f"no kernel runs experts of {moe.weight_dtype}, {moe.inter_dim} rows, {moe.table.shape[1]} addresses each"
        )


def _threads_that_fit(moe: MoeCall) -> int:
    """How many threads the scratch buffer serves; less than 1 if a buffer is too small."""
    (tokens, dim), top_k, experts = moe.x.shape, moe.topk_ids.shape[1], moe.table.shape[0]
    if moe.order.numel() < moe_kernel.order_integers(tokens, top_k, experts):
        return 0
    left = moe.scratch.numel() - moe_kernel.hidden_floats(tokens, top_k, moe.inter_dim)
    return left // moe_kernel.part_floats(dim, moe.inter_dim)


def _moe_experts_cpu(*args: Any) -> None:
    moe = MoeCall(*args)
    _check_moe(moe)
    (tokens, dim), top_k, experts = moe.x.shape, moe.topk_ids.shape[1], moe.table.shape[0]
    fitting = _threads_that_fit(moe)
    if fitting < 1:
        raise ValueError(f"order and scratch are too small for {tokens} tokens; moe_scratch_sizes gives their sizes")
    parts = min(fitting, parts_for(3 * tokens * top_k * dim * moe.inter_dim))
    buffers = (moe.x, moe.topk_ids, moe.topk_weights, moe.table, moe.out, moe.order, moe.scratch)
    sizes = (tokens, top_k, experts, dim, moe.inter_dim, KERNELS[moe.weight_dtype][1])
    if not call(moe_kernel.moe_experts, (*(buffer.data_ptr() for buffer in buffers), *sizes), parts):
        raise IndexError(f"topk_ids holds an expert outside 0 .. {experts - 1}")


def _moe_experts_fake(*args: Any) -> None:
    _check_moe(MoeCall(*args))


_library.impl("linear", _linear_cpu, "CPU")
_library.impl("moe_experts", _moe_experts_cpu, "CPU")
torch.library.register_fake("dsr1::linear", _linear_fake, lib=_library)
torch.library.register_fake("dsr1::moe_experts", _moe_experts_fake, lib=_library)

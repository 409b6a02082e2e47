"""The GPU kernels as torch operators: Triton's kernels on CUDA tensors, elsewhere and without Triton torch formulas.

An operator's fake implementation tells the shape of its result. What a kernel needs besides is an argument,
made where a memory count sees it: nothing is allocated behind an operator's back but its results.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.formats import QuantTensor
from quant.gpu import reference, shapes
from quant.latents import row_bytes, unpack_latents
from quant.packed import PACKED_FORMATS, ExpertRecord, expert_record

WEIGHT = "Tensor data, Tensor? weight_scale, str format"
_library = torch.library.Library("dsr1", "FRAGMENT")
_library.define(f"gpu_linear(Tensor x, {WEIGHT}, int rows, int columns, Tensor(a!) partial) -> Tensor")
_library.define(f"gpu_absorb(Tensor q, {WEIGHT}, int value, int lora) -> Tensor")
_library.define(f"gpu_project(Tensor latents, {WEIGHT}, int nope, int value) -> Tensor")
_library.define(
    "gpu_decode(Tensor q_latent, Tensor q_pe, Tensor cached, Tensor seen, float scale, Tensor(a!) partial, "
    "Tensor(b!) stats) -> Tensor"
)
_library.define(
    "gpu_prefill(Tensor q_nope, Tensor q_pe, Tensor kv, Tensor cached, int first_key, float scale, Tensor(a!) sums, "
    "Tensor(b!) stats, Tensor(c!) out) -> ()"
)
_library.define(
    "gpu_experts(Tensor x, Tensor weights, Tensor records, Tensor here, Tensor block_experts, Tensor slots, "
    "str format, int inter_dim, Tensor(a!) hidden, Tensor(b!) outputs) -> Tensor"
)


_library.define("gpu_latents(Tensor cached, int lora) -> Tensor")


@cache
def has_triton() -> bool:
    """Whether Triton is installed; torch's wheels for CUDA bring it."""
    return find_spec("triton") is not None


def reads_weight(weight: QuantTensor) -> bool:
    """Whether a kernel reads this format; torch's own matrix products serve the others."""
    return weight.format.name in (*PACKED_FORMATS, "fp8_block", "bf16")


def linear(x: Tensor, weight: QuantTensor) -> Tensor:
    """x [T, K] times weight [N, K]: [T, N] in x's dtype. Kernels take x of bfloat16, and any format but float32."""
    if not reads_weight(weight):
        return F.linear(x.float(), weight.data).to(x.dtype)
    (tokens, _), (rows, columns) = x.shape, weight.shape
    splits = shapes.linear_splits(tokens, rows, columns, weight.format.name)
    partial = x.new_empty((splits, tokens, rows) if splits > 1 else (0,), dtype=torch.float32)
    stored = weight.data, weight.scale, weight.format.name
    out: Tensor = torch.ops.dsr1.gpu_linear.default(x, *stored, rows, columns, partial)
    return out


def attend_absorbed(
    q_nope: Tensor, q_pe: Tensor, cached: Tensor, seen: Tensor, weight: QuantTensor, scale: float
) -> Tensor:
    """Attention of few queries, the last T of the first `seen` (int32 [1]) rows of `cached`: [T, H, v].

    q_nope bf16 [T, H, nope], q_pe bf16 [T, H, rope]; weight: wkv_b [H * (nope + v), lora].
    """
    (tokens, heads, nope), lora = q_nope.shape, weight.shape[1]
    value = weight.shape[0] // heads - nope
    stored = weight.data, weight.scale, weight.format.name
    q_latent = torch.ops.dsr1.gpu_absorb.default(q_nope, *stored, value, lora)
    splits = shapes.decode_splits(tokens, heads, cached.dtype == torch.uint8)
    partial = q_nope.new_empty(splits, tokens, heads, lora, dtype=torch.float32)
    stats = q_nope.new_empty(2, splits, tokens, heads, dtype=torch.float32)
    latents = torch.ops.dsr1.gpu_decode.default(q_latent, q_pe.contiguous(), cached, seen, scale, partial, stats)
    out: Tensor = torch.ops.dsr1.gpu_project.default(latents, *stored, nope, value)
    return out


def attend_decompressed(q_nope: Tensor, q_pe: Tensor, cached: Tensor, weight: QuantTensor, scale: float) -> Tensor:
    """Attention of many queries, the last T of the `cached` [N, row] tokens: [T, H, v]; else as attend_absorbed."""
    (tokens, heads, nope), lora = q_nope.shape, weight.shape[1]
    value = weight.shape[0] // heads - nope
    sums = q_nope.new_empty(tokens, heads, value, dtype=torch.float32)
    stats = q_nope.new_empty(2, tokens, heads, dtype=torch.float32)
    out, q_pe = q_nope.new_empty(tokens, heads, value), q_pe.contiguous()
    for first in range(0, cached.shape[0], shapes.KEY_BLOCK):
        block = cached.narrow(0, first, min(shapes.KEY_BLOCK, cached.shape[0] - first))
        latents = torch.ops.dsr1.gpu_latents.default(block, lora)
        kv = linear(latents if latents.dtype == q_nope.dtype else latents.to(q_nope.dtype), weight).view(
            -1, heads, nope + value
        )
        torch.ops.dsr1.gpu_prefill.default(q_nope, q_pe, kv, cached, first, scale, sums, stats, out)
    return out


def experts(x: Tensor, ids: Tensor, weights: Tensor, slots: Tensor, records: Tensor, record: ExpertRecord) -> Tensor:
    """float32 [T, dim]: the weighted sum over those of a token's experts `ids` [T, K] that are in `records`.

    x bf16 [T, dim]; weights float32 [T, K]; slots: int64 [E], which record an expert is, or -1.
    """
    here = slots.index_select(0, ids.flatten()).view_as(ids).to(torch.int32)
    return experts_here(x, here, weights, records, record)


def experts_here(x: Tensor, here: Tensor, weights: Tensor, records: Tensor, record: ExpertRecord) -> Tensor:
    """`experts`, of which each pair's record is known: here, int32 [T, K], or -1."""
    count, pairs = len(records), here.numel()
    config, _ = shapes.expert_configs(pairs, count, record.format.name)
    block_experts, pair_slots = sort_pairs(here, count, config.m)
    hidden = x.new_empty(len(pair_slots), record.inter_dim)
    outputs = x.new_empty(pairs, record.dim, dtype=torch.float32)
    how = record.format_name, record.inter_dim
    inputs = x.contiguous(), weights.float().contiguous(), records, here, block_experts, pair_slots
    out: Tensor = torch.ops.dsr1.gpu_experts.default(*inputs, *how, hidden, outputs)
    return out


def sort_pairs(here: Tensor, experts: int, m: int) -> tuple[Tensor, Tensor]:
    """Blocks of `m` pairs of one expert each, made without asking the host.

    here: int32 [T, K], each pair's record or -1. Returns int32 [blocks], the expert of each or -1, and int32
    [blocks * m], the pair in each slot, T * K where there is none.
    """
    pairs = here.numel()
    blocks = shapes.expert_blocks(pairs, experts, m)
    expert = torch.where(here < 0, experts, here).flatten().to(torch.int64)
    ones = torch.ones_like(expert)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=here.device).scatter_add_(0, expert, ones)
    needed = (counts + m - 1) // m
    needed[experts:] = 0
    ends = needed.cumsum(0)
    number = torch.arange(blocks, device=here.device)
    block_experts = torch.searchsorted(ends, number, right=True)
    block_experts = torch.where(block_experts < experts, block_experts, -1).to(torch.int32)
    order = expert.argsort(stable=True)
    sorted_experts = expert[order]
    rank = torch.arange(pairs, device=here.device) - (counts.cumsum(0) - counts)[sorted_experts]
    slot = (ends - needed)[sorted_experts] * m + rank
    slot = torch.where(sorted_experts < experts, slot, blocks * m)  # of those elsewhere: the one that is cut off
    slots = torch.full((blocks * m + 1,), pairs, dtype=torch.int32, device=here.device)
    return block_experts, slots.scatter_(0, slot, order.to(torch.int32))[: blocks * m]


def _formulas() -> dict[str, Callable[..., Any]]:
    """The torch formula of each operator, on its arguments; workspaces are left as they are."""
    return {
        "linear": lambda x, data, scale, name, n, k, partial: reference.linear(x, data, scale, name, (n, k)),
        "absorb": reference.absorb,
        "project": reference.project,
        "decode": lambda *args: reference.decode(*args[:5]),
        "prefill": reference.prefill,
        "experts": lambda x, weights, records, here, blocks, slots, name, inter, *spaces: reference.experts(
            x, weights, records, here, expert_record(name, x.shape[1], inter)
        ),
    }


def _on_cuda(name: str, formula: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel `name` of launch.py on bfloat16; the formula on other dtypes and where Triton is missing."""

    def run(*args: Any) -> Any:
        if args[0].dtype != torch.bfloat16 or not has_triton():
            return formula(*args)
        from quant.gpu import launch

        return getattr(launch, name)(*args)

    return run


def _fake_linear(x: Tensor, data: Tensor, scale: Tensor | None, name: str, n: int, k: int, partial: Tensor) -> Tensor:
    _check_device(x, data, scale, partial)
    if x.shape[1] != k:
        raise ValueError(f"x of {tuple(x.shape)} cannot be multiplied by a weight of {(n, k)}")
    _check_weight(data, scale, name, (n, k))
    return x.new_empty(x.shape[0], n)


def _fake_absorb(q: Tensor, data: Tensor, scale: Tensor | None, name: str, value: int, lora: int) -> Tensor:
    _check_device(q, data, scale)
    _check_weight(data, scale, name, (q.shape[1] * (q.shape[2] + value), lora))
    return q.new_empty(*q.shape[:2], lora)


def _fake_project(latents: Tensor, data: Tensor, scale: Tensor | None, name: str, nope: int, value: int) -> Tensor:
    _check_device(latents, data, scale)
    _check_weight(data, scale, name, (latents.shape[1] * (nope + value), latents.shape[2]))
    return latents.new_empty(*latents.shape[:2], value)


def _fake_decode(q_latent: Tensor, q_pe: Tensor, cached: Tensor, seen: Tensor, scale: float, *spaces: Tensor) -> Tensor:
    _check_device(q_latent, q_pe, cached, seen, *spaces)
    _check_cache(cached, q_latent.shape[2], q_pe.shape[2])
    return q_latent.new_empty(q_latent.shape)


def _fake_prefill(
    q_nope: Tensor, q_pe: Tensor, kv: Tensor, cached: Tensor, first: int, scale: float, *t: Tensor
) -> None:
    _check_device(q_nope, q_pe, kv, cached, *t)


def _fake_experts(x: Tensor, weights: Tensor, records: Tensor, here: Tensor, *rest: Any) -> Tensor:
    _check_device(x, weights, records, here, *(tensor for tensor in rest if isinstance(tensor, Tensor)))
    return x.new_empty(x.shape, dtype=torch.float32)


def _check_device(*tensors: Tensor | None) -> None:
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(
            f"tensors of one operator are on {' and '.join(sorted(map(str, devices)))}; both must be on one device"
        )


def _check_weight(data: Tensor, scale: Tensor | None, name: str, shape: tuple[int, int]) -> None:
    """ValueError unless a kernel may read `data` as a matrix of `shape`."""
    if name in PACKED_FORMATS:
        expected = PACKED_FORMATS[name].nbytes(shape)
        if data.dtype != torch.uint8 or data.numel() != expected or not data.is_contiguous():
            raise ValueError(f"a weight {shape} takes {expected} contiguous bytes as {name}, not {tuple(data.shape)}")
        return
    if tuple(data.shape) != shape or not data.is_contiguous() or (name == "fp8_block") != (scale is not None):
        raise ValueError(f"a weight {shape} of format {name} cannot be read from {data.dtype} {tuple(data.shape)}")


def _check_cache(cached: Tensor, lora: int, rope: int) -> None:
    width = row_bytes(lora, rope) if cached.dtype == torch.uint8 else lora + rope
    if cached.ndim != 2 or cached.shape[1] != width or not cached.is_contiguous():
        raise ValueError(
            f"a cache of {lora} latents and {rope} rope values is not {cached.dtype} {tuple(cached.shape)}"
        )


def _latents(cached: Tensor, lora: int) -> Tensor:
    """[N, lora] of cache rows, contiguous; of an 8-bit cache as bfloat16."""
    rows = unpack_latents(cached, lora, torch.bfloat16) if cached.dtype == torch.uint8 else cached
    return rows.narrow(1, 0, lora).contiguous()


def _fake_latents(cached: Tensor, lora: int) -> Tensor:
    """Of an 8-bit cache, codes and products in float32 live at a time."""
    if cached.dtype != torch.uint8:
        return cached.new_empty(len(cached), lora)
    cached.new_empty(2 * len(cached), lora, dtype=torch.float32)
    return cached.new_empty(len(cached), lora, dtype=torch.bfloat16)


_library.impl("gpu_latents", _latents, "CPU")
_library.impl("gpu_latents", _latents, "CUDA")
torch.library.register_fake("dsr1::gpu_latents", _fake_latents, lib=_library)

_FAKES: dict[str, Callable[..., Any]] = {
    "linear": _fake_linear,
    "absorb": _fake_absorb,
    "project": _fake_project,
    "decode": _fake_decode,
    "prefill": _fake_prefill,
    "experts": _fake_experts,
}


def _checked(check: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """Run after the checks of the fake implementation, whose result is dropped."""

    def checked(*args: Any) -> Any:
        check(*args)
        return run(*args)

    return checked


for _name, _formula in _formulas().items():
    _library.impl(f"gpu_{_name}", _checked(_FAKES[_name], _formula), "CPU")
    _library.impl(f"gpu_{_name}", _checked(_FAKES[_name], _on_cuda(_name, _formula)), "CUDA")
    torch.library.register_fake(f"dsr1::gpu_{_name}", _FAKES[_name], lib=_library)

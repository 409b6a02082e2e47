"""Launches the Triton kernels on tensors that operators (ops.py) have checked. Imports Triton."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from quant.gpu import shapes
from quant.gpu.attention_kernels import absorb_kernel, decode_kernel, join_splits_kernel, prefill_kernel, project_kernel
from quant.gpu.expert_kernels import combine_kernel, down_kernel, hidden_kernel
from quant.gpu.linear_kernels import linear_kernel, sum_splits_kernel
from quant.gpu.shapes import Config
from quant.packed import PACKED_FORMATS, expert_record

LOG2_E = math.log2(math.e)
SUM_BLOCK = 1024


def _options(config: Config) -> dict[str, Any]:
    return {"num_warps": config.warps, "num_stages": config.stages}


def format_code(name: str, device: torch.device) -> int:
    """The kernels' number of a format on a device."""
    if name in shapes.PACKED_CODES:
        return shapes.PACKED_CODES[name]
    if name == "bf16":
        return shapes.BF16_CODE
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= shapes.NATIVE_FP8_FROM
    return shapes.FP8_NATIVE_CODE if native else shapes.FP8_CODE


def weight_words(data: Tensor, name: str) -> Tensor:
    """`data` as the kernels read it: words of packed weights, bytes of FP8."""
    if name in PACKED_FORMATS:
        return data.view(torch.int32)
    return data if name == "bf16" else data.view(torch.uint8)


def linear(
    x: Tensor, data: Tensor, scale: Tensor | None, name: str, rows: int, columns: int, partial: Tensor
) -> Tensor:
    """x bf16 [T, K] times a weight [N, K]: bf16 [T, N]. partial: float32 [splits, T, N], or empty."""
    x, tokens = x.contiguous(), x.shape[0]
    config, code = shapes.linear_config(tokens, name), format_code(name, x.device)
    splits = max(1, partial.shape[0])
    each = triton.cdiv(triton.cdiv(columns, shapes.BLOCK_K), splits)
    out = x.new_empty(tokens, rows)
    grid = triton.cdiv(rows, config.n), triton.cdiv(tokens, config.m), splits
    target, words = (out if splits == 1 else partial), weight_words(data, name)
    scales = x if scale is None else scale
    sizes = tokens, rows, columns, each
    linear_kernel[grid](x, words, scales, target, *sizes, code, config.m, config.n, **_options(config))
    if splits > 1:
        blocks = (triton.cdiv(out.numel(), SUM_BLOCK),)
        sum_splits_kernel[blocks](partial, out, out.numel(), splits, SUM_BLOCK)
    return out


def absorb(q: Tensor, data: Tensor, scale: Tensor | None, name: str, value: int, lora: int) -> Tensor:
    """q bf16 [T, H, nope] times each head's first rows of wkv_b: bf16 [T, H, lora]."""
    (tokens, heads, nope), config = q.shape, shapes.ABSORB
    out = q.new_empty(tokens, heads, lora)
    grid = heads, triton.cdiv(lora, shapes.BLOCK_K), triton.cdiv(tokens, config.m)
    sizes = tokens, heads, heads * (nope + value), q.stride(0), q.stride(1)
    form = format_code(name, q.device), nope, value, lora, config.m
    scales = q if scale is None else scale
    absorb_kernel[grid](q, weight_words(data, name), scales, out, *sizes, *form, **_options(config))
    return out


def project(latents: Tensor, data: Tensor, scale: Tensor | None, name: str, nope: int, value: int) -> Tensor:
    """latents bf16 [T, H, lora] times each head's last rows of wkv_b: bf16 [T, H, value]."""
    (tokens, heads, lora), config = latents.shape, shapes.PROJECT
    out = latents.new_empty(tokens, heads, value)
    grid = heads, triton.cdiv(tokens, config.m)
    form = format_code(name, latents.device), nope, value, lora, config.m
    scales = latents if scale is None else scale
    words, rows = weight_words(data, name), heads * (nope + value)
    project_kernel[grid](latents, words, scales, out, tokens, heads, rows, *form, **_options(config))
    return out


def _views(cached: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """A cache's rows as the kernels read them: latents, float32 scales, rope keys; and whether they are bytes."""
    if cached.dtype != torch.uint8:
        return cached, cached, cached, False
    return cached.view(torch.int8), cached.view(torch.float32), cached.view(torch.bfloat16), True


def decode(
    q_latent: Tensor, q_pe: Tensor, cached: Tensor, seen: Tensor, scale: float, partial: Tensor, stats: Tensor
) -> Tensor:
    """Sums of latents bf16 [T, H, lora]. partial: float32 [splits, T, H, lora]; stats: float32 [2, splits, T, H]."""
    (tokens, heads, lora), rope, splits = q_latent.shape, q_pe.shape[2], partial.shape[0]
    *rows, in_bytes = _views(cached)
    config = shapes.decode_config(heads, in_bytes)
    grid = tokens * triton.cdiv(heads, config.m), splits
    numbers = tokens, heads, scale * LOG2_E
    form = lora, rope, in_bytes, config.m, config.n
    decode_kernel[grid](q_latent, q_pe, *rows, seen, partial, stats, *numbers, *form, **_options(config))
    out = torch.empty_like(q_latent)
    join_splits_kernel[(tokens * heads,)](partial, stats, out, tokens * heads, splits, lora)
    return out


def prefill(
    q_nope: Tensor,
    q_pe: Tensor,
    kv: Tensor,
    cached: Tensor,
    first_key: int,
    scale: float,
    sums: Tensor,
    stats: Tensor,
    out: Tensor,
) -> None:
    """One block of keys: kv bf16 [S, H, nope + value] of the tokens from `first_key` on among the `cached` [N, ...]."""
    (tokens, heads, nope), rope, config = q_nope.shape, q_pe.shape[2], shapes.PREFILL
    value, (seen, width) = out.shape[2], cached.shape
    _, _, ropes, in_bytes = _views(cached)
    lora = lora_of_bytes(width, rope) if in_bytes else width - rope
    grid = triton.cdiv(tokens, config.m), heads
    numbers = tokens, heads, first_key, kv.shape[0], seen, q_nope.stride(0), q_nope.stride(1), scale * LOG2_E
    form = lora, nope, rope, value, in_bytes, config.m, config.n
    prefill_kernel[grid](q_nope, q_pe, kv, ropes, sums, stats, out, *numbers, *form, **_options(config))


def lora_of_bytes(width: int, rope: int) -> int:
    """Latents of a cache row of `width` bytes: one byte each, and four more for each 128."""
    left = width - 2 * rope
    return left * 32 // 33 if left > 132 else left - 4


def experts(
    x: Tensor,
    weights: Tensor,
    records: Tensor,
    here: Tensor,
    block_experts: Tensor,
    slots: Tensor,
    name: str,
    inter: int,
    hidden: Tensor,
    outputs: Tensor,
) -> Tensor:
    """float32 [T, dim]. here: int32 [T, K], each pair's record or -1; block_experts, slots: ops.sort_pairs."""
    (tokens, top_k), dim = here.shape, x.shape[1]
    record = expert_record(name, dim, inter)
    words = records.view(torch.int32)
    config, down = shapes.expert_configs(here.numel(), len(records), record.format.name)
    code, pairs = shapes.PACKED_CODES[record.format.name], tokens * top_k
    offsets = record.nbytes // 4, record.w3 // 4
    tile, count = (code, config.m, config.n), len(block_experts)
    grid = triton.cdiv(inter, config.n), count
    sizes = pairs, top_k, dim, inter
    hidden_kernel[grid](x, words, block_experts, slots, hidden, *sizes, *offsets, *tile, **_options(config))
    offsets, grid = (record.nbytes // 4, record.w2 // 4), (triton.cdiv(dim, down.n), count)
    tile = shapes.PACKED_CODES[record.down_format.name], down.m, down.n
    inputs = hidden, words, block_experts, slots, weights
    down_kernel[grid](*inputs, outputs, pairs, dim, inter, *offsets, *tile, **_options(down))
    out = torch.empty(tokens, dim, dtype=torch.float32, device=x.device)
    combine_kernel[(tokens, triton.cdiv(dim, SUM_BLOCK))](outputs, here, out, top_k, dim, SUM_BLOCK)
    return out

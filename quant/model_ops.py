"""CPU kernels of the model's small steps, for the formulas that hybrid_rt/ writes beside their names (operators.py).

Each function checks dtypes, shapes and layout before a kernel reads memory.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quant.conversion import CODES, VALUE_COST, as_float32
from quant.kernels import absorbed, decompressed, elementwise, norm, packed_heads, rope, router
from quant.kernels.jit import Kernel
from quant.kernels.threads import parts_for
from quant.latents import unpack_latents
from quant.packed import BLOCK_K, HEAD_FORMATS, TILE_ROWS
from quant.tape import call, empty, leave_to_torch, scratch

LATENTS_TOGETHER = 512  # that become keys and values at a time


@cache
def _float_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _code(x: Tensor, dims: int) -> int:
    """The code of an activation's dtype; ValueError unless a kernel may read `x`, its last dimension lying close."""
    code = CODES.get(x.dtype)
    if code is None or x.ndim != dims or x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"activations must be float32 or bfloat16 of {dims} dimensions, the last one without gaps, not {x.dtype} "
            f"of shape {tuple(x.shape)}, strides {x.stride()}"
        )
    return code


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous float32 of shape {shape}, not {tensor.dtype} of shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}"
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, dim] of float32 or bfloat16, weight float32 [dim]."""
    out = empty(*x.shape, dtype=x.dtype)
    _norm_into(out, x, weight, eps)
    return out


def _norm_into(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    code = _code(x, 2)
    rows, dim = x.shape
    _check("a norm's weight", weight, (dim,))
    addresses = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
    sizes = (rows, dim, x.stride(0) * x.itemsize, out.stride(0) * out.itemsize, code, _float_bits(eps))
    call(norm.rms_norm, (*addresses, *sizes), parts_for(rows * dim * VALUE_COST))


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, rope] of float32 or bfloat16, cos and sin float32 [T, rope / 2]."""
    out = empty(*x.shape, dtype=x.dtype)
    _turn_into(out, x, cos, sin)
    return out


def _turn_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    code = _code(x, 3)
    tokens, heads, width = x.shape
    for angles in (cos, sin):
        _check("cosines and sines", angles, (tokens, width // 2))
    addresses = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    strides = tuple(stride * x.itemsize for stride in (x.stride(0), x.stride(1), out.stride(0)))
    call(rope.turn_pairs, (*addresses, tokens, heads, width, *strides, code), parts_for(x.numel() * VALUE_COST))


def latents(kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """kv [T, C + rope] of float32 or bfloat16; weight float32 [C], cos and sin float32 [T, rope / 2]."""
    out, lora = empty(*kv.shape, dtype=kv.dtype), weight.shape[0]
    _norm_into(out[:, :lora], kv[:, :lora], weight, eps)
    _turn_into(out[:, lora:].unsqueeze(1), kv[:, lora:].unsqueeze(1), cos, sin)
    return out


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, of one shape and of one dtype, float32 or bfloat16."""
    return _by_value(elementwise.add, a, b)


def silu_times(gates: Tensor, ups: Tensor) -> Tensor:
    """silu(gates) * ups, of one shape and of one dtype, float32 or bfloat16."""
    return _by_value(elementwise.silu_times, gates, ups)


def _by_value(kernel: Kernel, a: Tensor, b: Tensor) -> Tensor:
    code = _code(a, a.ndim)
    if a.shape != b.shape or a.dtype != b.dtype or not (a.is_contiguous() and b.is_contiguous()):
        raise ValueError(f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)} are not alike and without gaps")
    out = empty(*a.shape, dtype=a.dtype)
    arguments = (a.data_ptr(), b.data_ptr(), out.data_ptr(), a.numel(), code)
    call(kernel, arguments, parts_for(a.numel() * VALUE_COST))
    return out


def copy_rows(target: Tensor, source: Tensor) -> None:
    """target [T, columns] = source, rows without gaps, both of one dtype: float32, bfloat16 or uint8."""
    for tensor in (target, source):
        if tensor.dtype != torch.uint8 or tensor.ndim != 2 or tensor.stride(1) != 1:
            _code(tensor, 2)
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(f"{source.dtype} {tuple(source.shape)} does not fit {target.dtype} {tuple(target.shape)}")
    strides = (tensor.stride(0) * tensor.itemsize for tensor in (source, target))
    sizes = (source.shape[0], source.shape[1] * source.itemsize, *strides)
    arguments = (source.data_ptr(), target.data_ptr(), *sizes)
    call(elementwise.copy_rows, arguments, parts_for(source.numel() * VALUE_COST))


def route(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, limited_groups: int, top_k: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """x [T, dim] of float32 or bfloat16, weight float32 [E, dim], bias float32 [E]."""
    tokens, experts = x.shape[0], weight.shape[0]
    _check("the router's bias", bias, (experts,))
    if not 1 <= limited_groups <= groups or not 1 <= top_k <= experts // groups * limited_groups:
        raise ValueError(f"{top_k} of {experts} experts in {limited_groups} of {groups} groups cannot be chosen")
    logits = torch.ops.dsr1.linear.default(as_float32(x), weight, None)
    ids, weights = empty(tokens, top_k, dtype=torch.int64), empty(tokens, top_k)
    parts = parts_for(tokens * experts * top_k * VALUE_COST)
    space = scratch(parts * (2 * experts + groups))
    addresses = (t.data_ptr() for t in (logits, bias, ids, weights, space))
    sizes = (tokens, experts, groups, limited_groups, top_k, int(normalise), _float_bits(scale))
    call(router.route, (*addresses, *sizes), parts)
    return ids, weights


class _Sizes(NamedTuple):
    """Of one call of attention."""

    tokens: int
    seen: int
    heads: int
    nope: int
    rope: int
    value: int
    lora: int


def _head_rows(wkv_b: Tensor, lora: int) -> tuple[int, int]:
    """Rows of a head, 0 if they do not fit, and the code of wkv_b."""
    if wkv_b.dtype != torch.uint8:
        return wkv_b.shape[1] if wkv_b.shape[2:] == (lora,) else 0, _code(wkv_b, 3)
    code = packed_heads.HEADS_CODES.get(wkv_b.shape[-1])
    fits = code is not None and wkv_b.ndim == 4 and wkv_b.shape[2] * BLOCK_K == lora
    return wkv_b.shape[1] * TILE_ROWS if fits else 0, code or 0


def _check_attention(q_nope: Tensor, q_pe: Tensor, cached: Tensor, wkv_b: Tensor) -> tuple[_Sizes, int, int]:
    """Sizes and the codes of activations and wkv_b; ValueError unless a kernel may read the tensors."""
    code = _code(q_nope, 3)
    (tokens, heads, nope), rope, seen = q_nope.shape, q_pe.shape[-1], cached.shape[0]
    lora = cached.shape[1] - rope
    rows, wkv_code = _head_rows(wkv_b, lora)
    alike = _code(q_pe, 3) == _code(cached, 2) == code and q_pe.shape[:2] == (tokens, heads) and len(wkv_b) == heads
    whole = wkv_b.is_contiguous() and cached.is_contiguous() and rows > nope and lora > 0
    if not (alike and whole and tokens <= seen) or wkv_b.dtype == torch.uint8 and nope % TILE_ROWS:
        shapes = [(t.dtype, tuple(t.shape)) for t in (q_nope, q_pe, cached, wkv_b)]
        raise ValueError(f"queries, cached latents and wkv_b do not fit together: {shapes}")
    return _Sizes(tokens, seen, heads, nope, rope, rows - nope, lora), code, wkv_code


def _query_strides(q_nope: Tensor, q_pe: Tensor) -> tuple[int, ...]:
    """Bytes from token to token and from head to head."""
    return tuple(queries.stride(dim) * queries.itemsize for queries in (q_nope, q_pe) for dim in (0, 1))


def _unpacked(cached: Tensor, wkv_b: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer's cached tokens as kernels read them: those in 8 bits in `dtype`."""
    if cached.dtype != torch.uint8:
        return cached
    leave_to_torch("an 8-bit cache")
    lora = wkv_b.shape[2] * BLOCK_K if wkv_b.dtype == torch.uint8 else wkv_b.shape[2]
    return unpack_latents(cached, lora, dtype)


def attend_absorbed(q_nope: Tensor, q_pe: Tensor, cached: Tensor, wkv_b: Tensor, scale: float) -> Tensor:
    """q_nope [T, H, nope], q_pe [T, H, rope] and cached [N, C + rope] of one dtype, float32 or bfloat16.

    cached may also be uint8 [N, bytes of a row], of 8 bits (quant/latents.py); it is unpacked as a whole.
    wkv_b: [H, nope + v, C] of float32 or bfloat16; or packed, uint8 [H, tiles, blocks, bytes of a block].
    Returns [T, H, v] in q_nope's dtype.
    """
    cached = _unpacked(cached, wkv_b, q_nope.dtype)
    sizes, code, wkv_code = _check_attention(q_nope, q_pe, cached, wkv_b)
    tokens, seen, heads, nope, rope, value, lora = sizes
    out = empty(tokens, heads, value, dtype=q_nope.dtype)
    work = tokens * heads * (seen * (2 * lora + rope) + (nope + value) * lora)
    parts = min(heads, parts_for(work))
    space = scratch(parts * absorbed.scratch_floats(tokens, nope, rope, lora))
    addresses = (t.data_ptr() for t in (q_nope, q_pe, cached, wkv_b, out, space))
    rest = (*_query_strides(q_nope, q_pe), _float_bits(scale), code, wkv_code)
    call(absorbed.attend_absorbed, (*addresses, *sizes, *rest), parts)
    return out


def attend_decompressed(q_nope: Tensor, q_pe: Tensor, cached: Tensor, wkv_b: Tensor, scale: float) -> Tensor:
    """As attend_absorbed, for many queries."""
    cached = _unpacked(cached, wkv_b, q_nope.dtype)
    sizes, code, _ = _check_attention(q_nope, q_pe, cached, wkv_b)
    tokens, seen, heads, nope, rope, value, lora = sizes
    out = empty(tokens, heads, value, dtype=q_nope.dtype)
    state = scratch(heads * decompressed.units(tokens) * decompressed.state_floats(value))
    parts = parts_for(tokens * heads * seen * (nope + rope + value))
    space = scratch(parts * decompressed.scratch_floats(nope, rope, LATENTS_TOGETHER))
    for first in range(0, seen, LATENTS_TOGETHER):
        made = _decompress(cached[first : first + LATENTS_TOGETHER, :lora], wkv_b, heads * (nope + value))
        addresses = (t.data_ptr() for t in (q_nope, q_pe, cached, made, out, state, space))
        shape = (tokens, seen, first, made.shape[0], heads, nope, rope, value, cached.shape[1])
        rest = (*_query_strides(q_nope, q_pe), _float_bits(scale), code)
        call(decompressed.attend_block, (*addresses, *shape, *rest), parts)
    return out


def _decompress(latents: Tensor, wkv_b: Tensor, rows: int) -> Tensor:
    """Keys and values of cached latents [S, C]: float32 [S, H * (nope + v)]."""
    copied = empty(*latents.shape, dtype=latents.dtype)
    copy_rows(copied, latents)  # torch would wake threads of its own for that
    x = as_float32(copied)
    made: Tensor
    if wkv_b.dtype == torch.uint8:
        fmt = HEAD_FORMATS[wkv_b.shape[-1]].name
        made = torch.ops.dsr1.packed_linear.default(x, wkv_b.flatten(), fmt, rows, x.shape[1])
    else:
        made = torch.ops.dsr1.linear.default(x, wkv_b.flatten(0, 1), None)
    return made

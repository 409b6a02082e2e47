"""What the GPU kernels compute, in plain torch on any device: their judge, and their stand-in where Triton is missing.

Weights are decoded exactly and whole, sums are float32, results are rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.latents import unpack_latents
from quant.packed import (
    BLOCK_K,
    INTEGER_STEP,
    LINE,
    LOWEST_INTEGER,
    PACKED_FORMATS,
    TILE_ROWS,
    ExpertRecord,
    PackedFormat,
    blocks_per_row,
    tiles,
)

FP8_SIDE = 128


def weights(data: Tensor, scale: Tensor | None, name: str, shape: tuple[int, int]) -> Tensor:
    """float32 [N, K] of a matrix in any format."""
    if name in PACKED_FORMATS:
        return packed_weights(data, PACKED_FORMATS[name], shape)
    values = data.view(shape).float()
    if scale is None:
        return values
    spread = scale.repeat_interleave(FP8_SIDE, 0)[: shape[0]].repeat_interleave(FP8_SIDE, 1)[:, : shape[1]]
    return values * spread


def packed_weights(data: Tensor, fmt: PackedFormat, shape: tuple[int, int]) -> Tensor:
    """float32 [N, K] of a packed matrix, as quant/packing.py decodes it."""
    words = data.view(torch.int32).view(tiles(shape), blocks_per_row(shape), -1, TILE_ROWS)
    words = words.permute(0, 3, 1, 2)  # [tiles, 16, blocks, lines]
    header_lines = fmt.header_bytes // LINE
    step = torch.arange(BLOCK_K // 4 if fmt.bits == 8 else BLOCK_K // 8, device=data.device)
    codes = words[..., header_lines:][..., step, None] >> _shifts(fmt, data.device) & (1 << fmt.bits) - 1
    codes = codes.flatten(-2)  # [tiles, 16, blocks, 128]
    levels = codes - fmt.zero
    if fmt.levels is not None:
        levels = torch.tensor(fmt.levels, device=data.device, dtype=torch.int32)[codes]
    whole = levels * _integers(words[..., :header_lines], fmt)
    d = (words[..., :1] & -65536).view(torch.float32)
    values = (whole.float() * d).flatten(2).flatten(0, 1)
    return values[: shape[0], : shape[1]]


def _shifts(fmt: PackedFormat, device: torch.device) -> Tensor:
    """Where the codes of a word's columns begin."""
    column = torch.arange(4 if fmt.bits == 8 else 8, device=device, dtype=torch.int32)
    return column % 4 * 8 + column // 4 * 4


def _integers(header: Tensor, fmt: PackedFormat) -> Tensor:
    """What each column's level is multiplied by, int32 [tiles, 16, blocks, 128]; header: its words, a line each."""
    if fmt.integers is None:
        return torch.ones_like(header[..., :1])
    group = torch.arange(BLOCK_K // fmt.group, device=header.device, dtype=torch.int32)
    stored = header[..., -1:] >> 4 * group & 15
    if fmt.integers == "i6":
        stored = stored | (header[..., :1] >> 2 * group & 3) << 4
    return (stored * INTEGER_STEP[fmt.integers] + LOWEST_INTEGER[fmt.integers]).repeat_interleave(fmt.group, -1)


def linear(x: Tensor, data: Tensor, scale: Tensor | None, name: str, shape: tuple[int, int]) -> Tensor:
    """x [T, K] times the weight [N, K]: [T, N] in x's dtype."""
    return F.linear(x.float(), weights(data, scale, name, shape)).to(x.dtype)


def absorb(q: Tensor, data: Tensor, scale: Tensor | None, name: str, value: int, lora: int) -> Tensor:
    """q [T, H, nope] times each head's first rows of wkv_b: [T, H, lora]."""
    heads, nope = q.shape[1:]
    wkv_b = weights(data, scale, name, (heads * (nope + value), lora)).view(heads, nope + value, lora)
    return torch.einsum("thn,hnc->thc", q.float(), wkv_b[:, :nope]).to(q.dtype)


def project(latents: Tensor, data: Tensor, scale: Tensor | None, name: str, nope: int, value: int) -> Tensor:
    """latents [T, H, lora] times each head's last rows of wkv_b: [T, H, value]."""
    heads, lora = latents.shape[1:]
    wkv_b = weights(data, scale, name, (heads * (nope + value), lora)).view(heads, nope + value, lora)
    return torch.einsum("thc,hvc->thv", latents.float(), wkv_b[:, nope:]).to(latents.dtype)


def cache_rows(cached: Tensor, lora: int) -> Tensor:
    """float32 [N, lora + rope] of cache rows: floats, or bytes (quant/latents.py)."""
    return unpack_latents(cached, lora, torch.float32) if cached.dtype == torch.uint8 else cached.float()


def decode(q_latent: Tensor, q_pe: Tensor, cached: Tensor, seen: Tensor, scale: float) -> Tensor:
    """softmax(scores) @ latents for queries that are the last of the first `seen` [1] rows: [T, H, lora]."""
    tokens, _, lora = q_latent.shape
    key = torch.arange(len(cached), device=cached.device)
    rows = cache_rows(cached, lora).masked_fill((key >= seen)[:, None], 0)  # behind the tokens there may be NaN
    scores = torch.einsum("thc,sc->hts", torch.cat([q_latent, q_pe], dim=-1).float(), rows) * scale
    last = seen - tokens + torch.arange(tokens, device=cached.device)
    scores = scores.masked_fill(key > last[:, None], float("-inf"))
    return torch.einsum("hts,sc->thc", scores.softmax(-1), rows[:, :lora]).to(q_latent.dtype)


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
    """One block of keys. `sums` [T, H, v] and `stats` [2, T, H] carry the softmax on; the last one writes out."""
    tokens, _, nope = q_nope.shape
    keys, seen, rope = kv.shape[0], cached.shape[0], q_pe.shape[-1]
    block = cached[first_key : first_key + keys]
    k_pe = block[:, -2 * rope :].contiguous().view(torch.bfloat16) if cached.dtype == torch.uint8 else block[:, -rope:]
    scores = torch.einsum("thn,shn->ths", q_nope.float(), kv[..., :nope].float())
    scores = (scores + torch.einsum("thr,sr->ths", q_pe.float(), k_pe.float())) * scale
    key = first_key + torch.arange(keys, device=kv.device)
    last = seen - tokens + torch.arange(tokens, device=kv.device)
    scores = scores.masked_fill((key > last[:, None])[:, None], float("-inf"))
    before = stats if first_key else torch.stack([torch.full_like(stats[0], float("-inf")), torch.zeros_like(stats[1])])
    maximum = torch.maximum(before[0], scores.amax(-1))
    shares, shrink = (scores - maximum[..., None]).exp(), (before[0] - maximum).exp()
    total = before[1] * shrink + shares.sum(-1)
    weighted = torch.einsum("ths,shv->thv", shares, kv[..., nope:].float())
    if first_key:
        weighted = weighted + sums * shrink[..., None]
    if first_key + keys < seen:
        stats.copy_(torch.stack([maximum, total]))
        sums.copy_(weighted)
    else:
        out.copy_(weighted / total[..., None])


def experts(x: Tensor, weights_of_pairs: Tensor, records: Tensor, here: Tensor, record: ExpertRecord) -> Tensor:
    """float32 [T, dim]: the weighted sum over a token's experts. here: int32 [T, K], each pair's record or -1."""
    dim, inter = record.dim, record.inter_dim
    out = torch.zeros(x.shape[0], dim, dtype=torch.float32, device=x.device)
    for number, bytes_of in enumerate(records):
        w1, w3, w2 = (
            packed_weights(bytes_of[first : first + fmt.nbytes(shape)], fmt, shape)
            for first, shape, fmt in (
                (record.w1, (inter, dim), record.format),
                (record.w3, (inter, dim), record.format),
                (record.w2, (dim, inter), record.down_format),
            )
        )
        share = (weights_of_pairs * (here == number)).sum(-1, keepdim=True)
        out += F.linear(F.silu(F.linear(x.float(), w1)) * F.linear(x.float(), w3), w2) * share
    return out

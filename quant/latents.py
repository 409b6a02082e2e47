"""Rows of an 8-bit latent cache: one row for a token and layer, 656 bytes in R1.

    latents   C int8        a value is code × scale
    scales    ceil(C / 128) float32, one for each 128 latents: the largest of them / 127
    rope key  R bfloat16    as in a 16-bit cache

Codes are rounded to the nearest, ties to even, as torch.round does. A row of zeros has scales of 0.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.inventory import INT8_GROUP

MOST = 127  # -128 is not used


def row_bytes(lora: int, rope: int) -> int:
    """Bytes of a row of `lora` latents and a rope key of `rope` values."""
    return lora + 4 * groups(lora) + 2 * rope


def groups(lora: int) -> int:
    """Scales of a row."""
    return -(-lora // INT8_GROUP)


def pack_latents(latents: Tensor, lora: int) -> Tensor:
    """uint8 [..., bytes of a row] of latents [..., lora + rope] in any float dtype."""
    values = latents[..., :lora].float()
    grouped = pad(values, (0, -lora % INT8_GROUP)).unflatten(-1, (-1, INT8_GROUP))
    scales = grouped.abs().amax(dim=-1) / MOST  # [..., groups]
    codes = (grouped / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().to(torch.int8)
    parts = (codes.flatten(-2)[..., :lora], scales, latents[..., lora:].to(torch.bfloat16))
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1)


def unpack_latents(rows: Tensor, lora: int, dtype: torch.dtype) -> Tensor:
    """[..., lora + rope] in `dtype`, of rows uint8 [..., bytes of a row]; products are rounded once."""
    ends = lora, lora + 4 * groups(lora)
    codes = rows[..., : ends[0]].view(torch.int8)
    scales = rows[..., ends[0] : ends[1]].view(torch.float32)
    rope = rows[..., ends[1] :].view(torch.bfloat16)
    spread = scales.repeat_interleave(INT8_GROUP, dim=-1)[..., :lora]
    return torch.cat([(codes * spread).to(dtype), rope.to(dtype)], dim=-1)

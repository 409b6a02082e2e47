"""Attention over the latent cache, a block of it at a time: the workspace does not grow with the context.

A long chunk of prefill decompresses a block of latents into keys and values, uses it for all queries and drops it.
A short one, and decode, absorb wkv_b into the queries and the output instead, and work on the latents as they are
(DeepSeek-V2 paper, section 2.1.2). Both give the same numbers but for rounding; the number of tokens alone decides.
Softmax is online: a running maximum, a running sum, and the sums rescaled when the maximum grows. All arithmetic is
float32 whatever the cache holds: on a CPU it is no slower, and 16-bit products of shapes that grow with every token
would be compiled anew for each (measured: 30 ms a layer instead of 0.2).

Shapes: T query tokens, S cached tokens of one block, H heads, C = kv_lora.
"""

from collections.abc import Iterator

import torch

from hybrid_rt.cache import LatentCache
from quant import model_ops
from quant.dequantize import dequantize
from quant.formats import QuantTensor
from quant.latents import unpack_latents
from quant.operators import with_cpu_kernel
from quant.packed import BLOCK_K, HEAD_FORMATS, TILE_ROWS

# Tokens; beyond, decompressing a block costs less than the wider absorbed scores. At R1's widths both count the same
# operations at 171 tokens; measured, the break-even lies between 128 and 192.
ABSORBED_UP_TO = 128
PREFILL_BLOCK = 512
DECODE_BLOCK = 2048


class CachedAttention:
    """The context of tokens that are appended to a cache (`AttentionContext`)."""

    def __init__(self, cache: LatentCache, tokens: int, scale: float) -> None:
        self.cache, self.start, self.scale = cache, cache.length, scale
        self.positions = torch.arange(self.start, self.start + tokens, device=cache.data.device)

    def attend(
        self, layer: int, q_nope: torch.Tensor, q_pe: torch.Tensor, latent: torch.Tensor, wkv_b: torch.Tensor
    ) -> torch.Tensor:
        """Store the tokens' latents, then attend to all up to them.

        wkv_b: [H, nope + v, C], or packed (dense). Returns [T, H, v].
        """
        cached = self.cache.write(layer, self.start, latent)
        absorbed = q_nope.shape[0] <= ABSORBED_UP_TO
        attend = attend_absorbed if absorbed else attend_decompressed
        return attend(q_nope, q_pe, cached, wkv_b, self.scale)


class OnlineSoftmax:
    """softmax(scores) @ values over blocks of scores."""

    def __init__(self) -> None:
        self.sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # maximum, total, weighted values

    def add(self, scores: torch.Tensor, values: torch.Tensor) -> None:
        """scores: [..., T, S], overwritten; values: [..., S, D]; float32.

        Masked scores are -inf; no query may have its whole first block masked.
        """
        maximum = scores.amax(dim=-1, keepdim=True)
        if self.sums is not None:
            maximum = torch.maximum(maximum, self.sums[0])
        shares = scores.sub_(maximum).exp_()
        total = shares.sum(dim=-1, keepdim=True)
        weighted = shares @ values
        if self.sums is not None:
            shrink = (self.sums[0] - maximum).exp_()
            total += self.sums[1] * shrink
            weighted += self.sums[2] * shrink
        self.sums = maximum, total, weighted

    def result(self) -> torch.Tensor:
        """float32 [..., T, D]."""
        assert self.sums is not None, "there were no scores"
        return self.sums[2] / self.sums[1]


@with_cpu_kernel(
    "attend_decompressed(Tensor q_nope, Tensor q_pe, Tensor cached, Tensor wkv_b, float scale) -> Tensor",
    model_ops.attend_decompressed,
)
def attend_decompressed(
    q_nope: torch.Tensor, q_pe: torch.Tensor, cached: torch.Tensor, wkv_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """For many queries, the last T of the `cached` [N, C + rope] tokens, or of rows in 8 bits. Returns [T, H, v]."""
    wkv_b = dense(wkv_b)
    heads, width, lora = wkv_b.shape
    nope, rope = q_nope.shape[-1], q_pe.shape[-1]
    queries = torch.cat([q_nope, q_pe], dim=-1).float().transpose(0, 1) * scale  # [H, T, nope + rope]
    softmax = OnlineSoftmax()
    for first, block in _blocks(cached, PREFILL_BLOCK, lora):
        latents, k_pe = block.split([lora, rope], dim=-1)
        k_nope, values = (latents @ wkv_b.transpose(1, 2)).split([nope, width - nope], dim=-1)  # [H, S, nope | v]
        keys = torch.cat([k_nope, k_pe.expand(heads, -1, -1)], dim=-1)
        scores = queries @ keys.transpose(1, 2)  # [H, T, S]
        softmax.add(_mask_future(scores, first, cached.shape[0]), values)
    return softmax.result().transpose(0, 1).to(q_nope.dtype)


@with_cpu_kernel(
    "attend_absorbed(Tensor q_nope, Tensor q_pe, Tensor cached, Tensor wkv_b, float scale) -> Tensor",
    model_ops.attend_absorbed,
)
def attend_absorbed(
    q_nope: torch.Tensor, q_pe: torch.Tensor, cached: torch.Tensor, wkv_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """For few queries, the last T of the `cached` [N, C + rope] tokens, or of rows in 8 bits. Returns [T, H, v]."""
    wkv_b = dense(wkv_b)
    lora, nope = wkv_b.shape[-1], q_nope.shape[-1]
    w_uk, w_uv = wkv_b[:, :nope], wkv_b[:, nope:]
    q_latent = q_nope.float().transpose(0, 1) @ w_uk  # [H, T, C]
    queries = torch.cat([q_latent, q_pe.float().transpose(0, 1)], dim=-1) * scale
    softmax = OnlineSoftmax()
    for first, block in _blocks(cached, DECODE_BLOCK, lora):
        scores = queries @ block.T  # [H, T, S]
        softmax.add(_mask_future(scores, first, cached.shape[0]), block[:, :lora])
    heads = softmax.result() @ w_uv.transpose(1, 2)  # [H, T, v]
    return heads.transpose(0, 1).to(q_nope.dtype)


def dense(wkv_b: torch.Tensor) -> torch.Tensor:
    """wkv_b as float32 [H, nope + v, C]; packed it is uint8 [H, tiles, blocks, bytes of a block]."""
    if wkv_b.dtype != torch.uint8:
        return wkv_b.float()
    heads, tiles, blocks, block_bytes = wkv_b.shape
    weight = QuantTensor(HEAD_FORMATS[block_bytes], (heads * tiles * TILE_ROWS, blocks * BLOCK_K), wkv_b.flatten())
    return dequantize(weight).unflatten(0, (heads, -1))


def _blocks(cached: torch.Tensor, size: int, lora: int) -> Iterator[tuple[int, torch.Tensor]]:
    """float32 [S, lora + rope] of the cached tokens from each `first` on."""
    for first in range(0, cached.shape[0], size):
        rows = cached[first : first + size]
        yield first, unpack_latents(rows, lora, torch.float32) if rows.dtype == torch.uint8 else rows.float()


def _mask_future(scores: torch.Tensor, first: int, seen: int) -> torch.Tensor:
    """Set scores of keys after their query to -inf. Keys begin at `first`; the queries are the last of `seen`."""
    queries, keys = scores.shape[-2:]
    first_query = seen - queries
    if first + keys <= first_query + 1:
        return scores
    key = torch.arange(first, first + keys, device=scores.device)
    query = torch.arange(first_query, seen, device=scores.device)
    return scores.masked_fill_(key > query[:, None], float("-inf"))

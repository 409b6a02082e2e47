"""The context of tokens on a GPU: positions and lengths are on the device, so that a recorded graph serves all."""

import torch

from hybrid_rt.attention import AttentionContext, HeadMatrix
from hybrid_rt.cache import LatentCache
from hybrid_rt.latent_attention import ABSORBED_UP_TO, CachedAttention, attend_absorbed, attend_decompressed
from quant.config import ModelConfig
from quant.dequantize import dequantize
from quant.formats import QuantTensor
from quant.gpu import ops, shapes


def attention_context(cache: LatentCache, tokens: int, scale: float) -> AttentionContext:
    """The context of `tokens` tokens that follow those in `cache`, for the device that the cache is on."""
    if not cache.data.is_cuda:
        return CachedAttention(cache, tokens, scale)
    return DeviceAttention(cache, tokens, scale)


def graphs_serve(config: ModelConfig, kv_b: str) -> bool:
    """Whether attention of a model reads its length on the device. kv_b: the format of wkv_b."""
    widths = config.qk_nope_head_dim, config.v_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    return shapes.reads_heads(*widths) and kv_b != "f32"


class DeviceAttention:
    """Attention by the kernels of quant/gpu; by torch's own operators for widths of heads that these do not take.

    positions: int64 [T]; seen: int32 [1], all tokens up to the last of these. Given, they may change between two runs
    of a graph, and `tokens` must be few.
    """

    def __init__(
        self,
        cache: LatentCache,
        tokens: int,
        scale: float,
        positions: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
    ) -> None:
        device, self.end = cache.data.device, cache.length + tokens
        self.cache, self.scale = cache, scale
        self.positions = torch.arange(cache.length, self.end, device=device) if positions is None else positions
        self.seen = torch.full((1,), self.end, dtype=torch.int32, device=device) if seen is None else seen

    def attend(
        self,
        layer: int,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        latent: torch.Tensor,
        wkv_b: HeadMatrix,
    ) -> torch.Tensor:
        """Store the tokens' latents, then attend to all up to them. Returns [T, H, v]."""
        assert isinstance(wkv_b, QuantTensor), "on a GPU wkv_b stays as it is stored"
        self.cache.write_at(layer, self.positions, latent)
        (tokens, heads, nope), cached = q_nope.shape, self.cache.data.select(0, layer)
        absorbed = tokens <= ABSORBED_UP_TO
        value = wkv_b.shape[0] // heads - nope
        if not (shapes.reads_heads(nope, value, q_pe.shape[2], wkv_b.shape[1]) and ops.reads_weight(wkv_b)):
            attend = attend_absorbed if absorbed else attend_decompressed
            dense = dequantize(wkv_b).unflatten(0, (heads, -1))
            return attend(q_nope, q_pe, cached.narrow(0, 0, self.end), dense, self.scale)
        if absorbed:
            return ops.attend_absorbed(q_nope, q_pe, cached, self.seen, wkv_b, self.scale)
        return ops.attend_decompressed(q_nope, q_pe, cached.narrow(0, 0, self.end), wkv_b, self.scale)

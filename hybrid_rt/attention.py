"""Multi-head latent attention (DeepSeek-V2 paper, section 2.1): queries, and one latent a token for all heads.

Shapes: T tokens, H heads. `nope` and `rope` are the parts of a head without and with position.
"""

from typing import Protocol

import torch
from torch import nn

from hybrid_rt.layers import Parts, RMSNorm, rms_norm
from hybrid_rt.rope import Angles, rotate
from quant import model_ops
from quant.config import ModelConfig
from quant.formats import QuantTensor
from quant.operators import with_cpu_kernel

LATENT_NORM_EPS = 1e-6  # q_norm and kv_norm use it whatever the config's rms_norm_eps says


HeadMatrix = torch.Tensor | QuantTensor


class AttentionContext(Protocol):
    """The tokens of one forward pass among those that they see."""

    positions: torch.Tensor  # int64 [T]

    def attend(
        self,
        layer: int,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        latent: torch.Tensor,
        wkv_b: torch.Tensor | QuantTensor,
    ) -> torch.Tensor:
        """Attention's output [T, H, v] of these tokens; `latent` [T, kv_lora + rope] are their own keys and values.

        wkv_b: [H, nope + v, kv_lora], or as it is stored [H * (nope + v), kv_lora].
        """


class MLA(nn.Module):
    """Attention of one layer. What the tokens attend to is the context's affair."""

    def __init__(self, config: ModelConfig, layer: int, parts: Parts) -> None:
        super().__init__()
        prefix = f"layers.{layer}.attn"
        self.layer, self.n_heads, self.kv_lora_rank = layer, config.n_heads, config.kv_lora_rank
        self.head_split = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self.low_rank_queries = config.q_lora_rank > 0
        if self.low_rank_queries:
            self.wq_a = parts.linear(f"{prefix}.wq_a")
            self.q_norm = RMSNorm(parts.tensor(f"{prefix}.q_norm", torch.float32), LATENT_NORM_EPS)
            self.wq_b = parts.linear(f"{prefix}.wq_b")
        else:
            self.wq = parts.linear(f"{prefix}.wq")
        self.wkv_a = parts.linear(f"{prefix}.wkv_a")
        self.kv_norm = RMSNorm(parts.tensor(f"{prefix}.kv_norm", torch.float32), LATENT_NORM_EPS)
        self.wkv_b = parts.whole(f"{prefix}.wkv_b")
        self.wo = parts.linear(f"{prefix}.wo")

    def forward(self, x: torch.Tensor, angles: Angles, context: AttentionContext) -> torch.Tensor:
        q_nope, q_pe = self.queries(x, angles)
        wkv_b = self.wkv_b()
        if isinstance(wkv_b, torch.Tensor):
            wkv_b = wkv_b.unflatten(0, (self.n_heads, -1))  # [H, nope + v, kv_lora]
        heads = context.attend(self.layer, q_nope, q_pe, self.latent(x, angles), wkv_b)
        return self.wo(heads.flatten(-2))

    def queries(self, x: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, torch.Tensor]:
        """q_nope [T, H, nope] and q_pe [T, H, rope], the latter turned to its position."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.low_rank_queries else self.wq(x)
        q_nope, q_pe = q.unflatten(-1, (self.n_heads, -1)).split(self.head_split, dim=-1)
        return q_nope, rotate(q_pe, angles)

    def latent(self, x: torch.Tensor, angles: Angles) -> torch.Tensor:
        """What the cache holds of each token: the normed latent and the turned rope key, [T, kv_lora + rope]."""
        return make_latents(self.wkv_a(x), self.kv_norm.weight, self.kv_norm.eps, angles.cos, angles.sin)


@with_cpu_kernel(
    "make_latents(Tensor kv, Tensor weight, float eps, Tensor cos, Tensor sin) -> Tensor", model_ops.latents
)
def make_latents(
    kv: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Norm the latents of kv [T, kv_lora + rope] by `weight` [kv_lora], and turn the rope keys behind them."""
    latent, k_pe = kv.split([weight.shape[0], kv.shape[1] - weight.shape[0]], dim=-1)
    return torch.cat([rms_norm(latent, weight, eps), rotate(k_pe, Angles(cos, sin))], dim=-1)

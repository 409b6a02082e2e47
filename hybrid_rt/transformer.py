"""The model: embedding, blocks, final norm and head; and the modules for multi-token prediction.

Shapes: T tokens in one flat row, whatever sequences they belong to; the context knows which see which.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hybrid_rt.attention import MLA, AttentionContext
from hybrid_rt.layers import MLP, Parts, RMSNorm, add
from hybrid_rt.moe import MoE
from hybrid_rt.rope import Angles, Rope
from quant.config import ModelConfig


class Block(nn.Module):
    """One layer: attention, then a dense MLP or a mixture of experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, parts: Parts) -> None:
        super().__init__()
        prefix = f"layers.{layer}"
        self.attn_norm = RMSNorm(parts.tensor(f"{prefix}.attn_norm", torch.float32), config.norm_eps)
        self.attn = MLA(config, layer, parts)
        self.ffn_norm = RMSNorm(parts.tensor(f"{prefix}.ffn_norm", torch.float32), config.norm_eps)
        self.ffn = MoE(config, layer, parts) if config.is_moe(layer) else MLP(f"{prefix}.ffn", parts)

    def forward(self, x: torch.Tensor, angles: Angles, context: AttentionContext) -> torch.Tensor:
        x = add(x, self.attn(self.attn_norm(x), angles, context))
        return add(x, self.ffn(self.ffn_norm(x)))


class MTP(nn.Module):
    """Predicts one token further from a token's final state and the next token (DeepSeek-V3 paper, section 2.2)."""

    def __init__(self, config: ModelConfig, layer: int, parts: Parts) -> None:
        super().__init__()
        prefix = f"layers.{layer}"
        self.embed = parts.embedding(f"{prefix}.embed")
        self.enorm = RMSNorm(parts.tensor(f"{prefix}.enorm", torch.float32), config.norm_eps)
        self.hnorm = RMSNorm(parts.tensor(f"{prefix}.hnorm", torch.float32), config.norm_eps)
        self.eh_proj = parts.linear(f"{prefix}.eh_proj")
        self.block = Block(config, layer, parts)
        self.norm = RMSNorm(parts.tensor(f"{prefix}.shared_head.norm", torch.float32), config.norm_eps)
        self.head = parts.linear(f"{prefix}.shared_head.head")

    def forward(
        self, state: torch.Tensor, next_ids: torch.Tensor, angles: Angles, context: AttentionContext
    ) -> torch.Tensor:
        """Logits [T, vocab] for the token after `next_ids` [T]; `state` [T, dim] is the model's final normed state."""
        embedded = F.embedding(next_ids, self.embed).to(state.dtype)
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(state)], dim=-1))
        return self.head(self.norm(self.block(x, angles, context)))


class Transformer(nn.Module):
    """DeepSeek-V3. Weights come from `parts`; `dtype` is that of the residual stream."""

    def __init__(self, config: ModelConfig, parts: Parts, dtype: torch.dtype, mtp_layers: int) -> None:
        super().__init__()
        self.dtype = dtype
        self.rope = Rope(config)
        self.embed = parts.embedding("embed")
        self.layers = nn.ModuleList(Block(config, layer, parts) for layer in range(config.n_layers))
        self.norm = RMSNorm(parts.tensor("norm", torch.float32), config.norm_eps)
        self.head = parts.linear("head")
        extra = range(config.n_layers, config.n_layers + mtp_layers)
        self.mtp = nn.ModuleList(MTP(config, layer, parts) for layer in extra)

    def forward(self, ids: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """The final normed states [T, dim] of the tokens `ids` [T]; `head` makes logits of them."""
        device = context.positions.device  # the embedding stays in RAM
        return self.run(self.embedded(ids).to(device), self.rope(context.positions), context)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first layer sees of the tokens: [T, dim]."""
        return F.embedding(ids, self.embed).to(self.dtype)

    def run(self, x: torch.Tensor, angles: Angles, context: AttentionContext) -> torch.Tensor:
        """All layers and the final norm, on embedded tokens x [T, dim]."""
        for block in self.layers:
            x = block(x, angles, context)
        return self.norm(x)

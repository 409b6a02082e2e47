"""A mixture of experts: routed experts beside shared ones that see every token."""

import torch
from torch import nn

from hybrid_rt.gate import Gate
from hybrid_rt.layers import MLP, Parts, add
from quant.config import ModelConfig


class MoE(nn.Module):
    """The routed experts are submitted first, so that they run while the shared ones do."""

    def __init__(self, config: ModelConfig, layer: int, parts: Parts) -> None:
        super().__init__()
        self.gate = Gate(config, layer, parts)
        self.experts = parts.experts(layer)
        self.shared_experts = MLP(f"layers.{layer}.ffn.shared_experts", parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.gate(x)
        pending = self.experts.submit(x, ids, weights)
        shared = self.shared_experts(x)
        return add(shared, self.experts.sync(pending))

"""The router: which experts a token goes to, and with what weight (DeepSeek-V3 paper, section 2.1.2)."""

import torch
import torch.nn.functional as F
from torch import nn

from hybrid_rt.layers import Parts
from quant import model_ops
from quant.config import ModelConfig
from quant.operators import with_cpu_kernel

EXPERTS_SCORING_A_GROUP = 2  # a group is as good as the sum of its best two


class Gate(nn.Module):
    """Sigmoid scores; the correction bias takes part in the choice and not in the weights. All in float32."""

    def __init__(self, config: ModelConfig, layer: int, parts: Parts) -> None:
        super().__init__()
        self.top_k, self.route_scale, self.norm_topk_prob = (
            config.n_activated_experts,
            config.route_scale,
            config.norm_topk_prob,
        )
        self.n_groups, self.n_limited_groups = config.n_expert_groups, config.n_limited_groups
        self.weight = parts.tensor(f"layers.{layer}.ffn.gate.weight", torch.float32)
        self.bias = parts.tensor(f"layers.{layer}.ffn.gate.bias", torch.float32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64 [T, top_k] and weights float32 [T, top_k], of x [T, dim]."""
        how = (self.n_groups, self.n_limited_groups, self.top_k, self.norm_topk_prob, self.route_scale)
        return route(x, self.weight, self.bias, *how)


@with_cpu_kernel(
    "route(Tensor x, Tensor weight, Tensor bias, int groups, int limited_groups, int top_k, bool normalise, "
    "float scale) -> (Tensor, Tensor)",
    model_ops.route,
)
def route(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    limited_groups: int,
    top_k: int,
    normalise: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 [T, top_k] and weights float32 [T, top_k], of x [T, dim], weight [E, dim] and bias [E]."""
    scores = F.linear(x.float(), weight).sigmoid()  # [T, E]
    ids = limit_groups(scores + bias, groups, limited_groups).topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, ids)
    if normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids, weights * scale


def limit_groups(choice: torch.Tensor, groups: int, limited_groups: int) -> torch.Tensor:
    """Mask the experts outside the best groups with -inf: with 0 they would win over negative scores."""
    if groups == 1:
        return choice
    grouped = choice.unflatten(-1, (groups, -1))  # [T, G, E / G]
    group_scores = grouped.topk(EXPERTS_SCORING_A_GROUP, dim=-1).values.sum(-1)
    best = group_scores.topk(limited_groups, dim=-1, sorted=False).indices
    excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(excluded.unsqueeze(-1), float("-inf")).flatten(-2)

"""Rotary positions with YaRN, as in DeepSeek-V3's inference/model.py (`precompute_freqs_cis`)."""

import math
from dataclasses import dataclass

import torch

from quant import model_ops
from quant.config import ModelConfig, YarnConfig
from quant.operators import with_cpu_kernel


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of every position and pair of values: float32 [T, rope / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians a position, one for each pair of values: float32 [rope / 2].

    YaRN leaves fast pairs as they are, divides slow ones by the factor, and ramps between the two
    (YaRN paper, section 3.2).
    """
    width = config.qk_rope_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / config.rope_theta**exponents
    if config.yarn is None:
        return plain
    kept = 1.0 - _ramp(config.yarn, config.rope_theta, width)
    return plain / config.yarn.factor * (1.0 - kept) + plain * kept


def _ramp(yarn: YarnConfig, theta: float, width: int) -> torch.Tensor:
    """0 where a pair turns more than beta_fast times in the original context, 1 below beta_slow turns."""

    def pair_with(turns: float) -> float:
        return width * math.log(yarn.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32)
    # Below 2 pi * beta_slow tokens `high` comes before `low`; the published code then turns no pair slower.
    return ((pairs - low) / (high - low or 0.001)).clamp(0, 1)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Growth of attention's temperature with the context's factor (YaRN paper, section 3.3)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """What scores are multiplied by before the softmax."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is None:
        return scale
    return scale * yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2


def angle_gain(config: ModelConfig) -> float:
    """What cosines and sines are multiplied by; 1 in all published models."""
    if config.yarn is None:
        return 1.0
    factor = config.yarn.factor
    return yarn_mscale(factor, config.yarn.mscale) / yarn_mscale(factor, config.yarn.mscale_all_dim)


class Rope(torch.nn.Module):
    """Angles of positions, from frequencies computed once."""

    frequencies: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gain = angle_gain(config)
        self.register_buffer("frequencies", inverse_frequencies(config), persistent=False)

    def forward(self, positions: torch.Tensor) -> Angles:
        """positions: int64 [T]."""
        turned = positions.float()[:, None] * self.frequencies
        return Angles(turned.cos() * self.gain, turned.sin() * self.gain)


def rotate(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Turn the pairs (2i, 2i+1) of the last dimension, left in place. x: [T, heads, rope] or [T, rope]."""
    if x.dim() == 2:
        return turn_pairs(x[:, None], angles.cos, angles.sin)[:, 0]
    return turn_pairs(x, angles.cos, angles.sin)


@with_cpu_kernel("turn_pairs(Tensor x, Tensor cos, Tensor sin) -> Tensor", model_ops.turn_pairs)
def turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [T, heads, rope]; cos, sin: float32 [T, rope / 2]."""
    cos, sin = cos[:, None], sin[:, None]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)

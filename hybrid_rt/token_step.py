"""The work of one token, as in decoding: the same each time but for the position, so it is recorded (quant/tape.py)."""

import torch

from hybrid_rt.cache import LatentCache
from hybrid_rt.latent_attention import CachedAttention
from hybrid_rt.rope import Angles
from hybrid_rt.transformer import Transformer
from quant.tape import Repeated


class TokenStep:
    """Appends one token at a time to one cache, all on the host."""

    def __init__(self, transformer: Transformer, scale: float) -> None:
        self.transformer, self.scale = transformer, scale
        self.inputs: tuple[torch.Tensor, Angles] | None = None
        self.repeated = Repeated()

    def forward(self, ids: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        """The final state [1, dim] of the token `ids` [1]; `cache` is the same every time."""
        context = CachedAttention(cache, 1, self.scale)
        x, angles = self._kept(self.transformer.embedded(ids), self.transformer.rope(context.positions))
        states = self.repeated.run(cache.length, lambda: self.transformer.run(x, angles, context))
        return states.clone()

    def _kept(self, x: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, Angles]:
        """The inputs, in the same memory for every token."""
        if self.inputs is None:
            self.inputs = x, angles
        else:
            kept, turned = self.inputs
            kept.copy_(x)
            turned.cos.copy_(angles.cos)
            turned.sin.copy_(angles.sin)
        return self.inputs

"""Decoding steps on a GPU, replayed from graphs (offload/graphs.py): one recording for each number of tokens in use.

The first step of a number of tokens runs as it is, so that every kernel is compiled; the second one is captured.
"""

import torch

from hybrid_rt.cache import LatentCache
from hybrid_rt.gpu_attention import DeviceAttention
from hybrid_rt.transformer import Transformer
from offload.graphs import CapturedStep, GraphingBackend

MOST_TOKENS = 16  # of a step that is worth recording


class GraphSteps:
    """Appends a few tokens at a time to one cache."""

    def __init__(self, transformer: Transformer, scale: float, backend: GraphingBackend) -> None:
        self.transformer, self.scale, self.backend = transformer, scale, backend
        self.steps: dict[int, _Step] = {}

    def forward(self, ids: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        """The final states [T, dim] of the tokens `ids` [T]; `cache` is the same every time."""
        tokens = len(ids)
        if tokens not in self.steps:
            self.steps[tokens] = _Step(self, tokens, cache.data.device)
        return self.steps[tokens].forward(ids, cache).clone()


class _Step:
    """The fixed inputs of steps of `tokens` tokens, and their recording."""

    def __init__(self, steps: GraphSteps, tokens: int, device: torch.device) -> None:
        self.steps = steps
        self.x: torch.Tensor | None = None
        self.positions = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.seen = torch.zeros(1, dtype=torch.int32, device=device)
        self.captured: CapturedStep | None = None

    def forward(self, ids: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        transformer, first = self.steps.transformer, cache.length
        embedded = transformer.embedded(ids).to(self.positions.device)
        positions = torch.arange(first, first + len(ids), device=self.positions.device)
        self.positions.copy_(positions)
        self.seen.fill_(first + len(ids))
        if self.x is None:
            self.x = embedded.clone()
            return self._run(self.x, cache)
        self.x.copy_(embedded)
        if self.captured is None:
            x = self.x
            self.captured = self.steps.backend.capture(lambda: self._run(x, cache))
        return self.captured.replay()

    def _run(self, x: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        steps = self.steps
        context = DeviceAttention(cache, len(x), steps.scale, self.positions, self.seen)
        return steps.transformer.run(x, steps.transformer.rope(self.positions), context)

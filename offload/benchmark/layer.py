"""Layers of random experts, run as a model's are: submit and sync over the buffers that all layers share.

A shape gets as many layers as its models have, up to some gigabytes, so that weights come from RAM and not from a
cache. Calls go from layer to layer. Those of one token are played from a recording, as decoding is (quant/tape.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import torch
from torch import Tensor

from offload.backend import CpuBackend
from offload.benchmark.draw import ExpertDraw
from offload.benchmark.weights import random_records
from offload.experts import CpuExperts, ExpertBuffers, PackedExperts
from offload.sizes import format_size
from offload.workspace import host_bytes
from quant.config import ModelConfig
from quant.errors import Dsr1Error
from quant.kernels import thread_count
from quant.packed import ExpertRecord, PackedFormat
from quant.tape import PASSES, NotRecordableError, Repeated

ENOUGH_BYTES = 4 * 2**30  # several times the largest caches
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Extent:
    """How many layers, with how many experts each, are measured."""

    layers: int
    experts: int


class TokenCall:
    """A layer's call for one token, recorded when it is made; `ids` and `weights` say with which experts.

    x: bfloat16 [1, dim].
    """

    def __init__(self, layer: CpuExperts, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        self._layer, self._x, self._ids, self._weights = layer, x, ids.clone(), weights.clone()
        self._repeated = Repeated()
        for position in range(PASSES):
            self._repeated.run(position, self._work)
        if self._repeated.tape is None:
            raise NotRecordableError("a call of a layer of experts")

    def run(self, ids: Tensor, weights: Tensor) -> Tensor:
        """The layer's output, bfloat16 [1, dim], in the same memory every time."""
        self._ids.copy_(ids)
        self._weights.copy_(weights)
        return self._repeated.run(PASSES, self._work)

    def _work(self) -> Tensor:
        return self._layer.sync(self._layer.submit(self._x, self._ids, self._weights))


@dataclass(frozen=True, eq=False)
class Turn:
    """One call: a layer and its weights, and what a router would ask. ids: int64 [T, K]; weights: float32 [T, K].

    recorded: the layer's call for one token, for T = 1.
    """

    layer: CpuExperts
    packed: PackedExperts
    ids: Tensor
    weights: Tensor
    recorded: TokenCall | None = None

    @property
    def chosen(self) -> list[int]:
        """The different experts that the call touches."""
        return [int(expert) for expert in torch.unique(self.ids)]


def choose_extent(config: ModelConfig, fmt: PackedFormat, max_tokens: int, ram: int) -> Extent:
    """As much of a model as gives honest figures and fits `ram` bytes.

    Raises Dsr1Error if not even one token's experts fit.
    """
    record = ExpertRecord(fmt, config.dim, config.moe_inter_dim)
    room = (ram - host_bytes(config, max_tokens)) // record.nbytes
    if room < config.n_activated_experts:
        needed = ram + (config.n_activated_experts - room) * record.nbytes
        raise Dsr1Error(
            f"a token of this shape uses {config.n_activated_experts} experts of {format_size(record.nbytes)}, and "
            f"{format_size(max(0, ram))} of RAM are free; free about {format_size(needed)}, or measure fewer tokens "
            "at once or a smaller shape"
        )
    experts = min(config.n_routed_experts, room)
    wanted = ceil(ENOUGH_BYTES / (config.n_routed_experts * record.nbytes))
    return Extent(max(1, min(wanted, config.n_moe_layers, room // experts)), experts)


class BenchLayers:
    """Random layers of one shape, and calls of up to `max_tokens` tokens that go through them in turn.

    Set the number of threads before: a later, larger number is not made use of.
    """

    def __init__(
        self, config: ModelConfig, fmt: PackedFormat, extent: Extent, max_tokens: int, tell: Tell, seed: int = 0
    ) -> None:
        self.config = replace(config, n_routed_experts=extent.experts)
        self.record = ExpertRecord(fmt, config.dim, config.moe_inter_dim)
        self.extent, self.max_tokens = extent, max_tokens
        self.weight_bytes = extent.layers * extent.experts * self.record.nbytes
        tell(f"making {format_size(self.weight_bytes)} of random weights")
        self._rng = np.random.default_rng(seed)
        records = random_records(self.record, extent.layers * extent.experts, seed)
        self.packed = [PackedExperts(part, self.record) for part in records.split(extent.experts)]
        backend = CpuBackend()
        buffers = ExpertBuffers(self.config, backend, max_tokens)
        self.layers = [CpuExperts(packed, backend, buffers) for packed in self.packed]
        top_k = config.n_activated_experts
        self._draws = [ExpertDraw(extent.experts, top_k, seed + number) for number in range(extent.layers)]
        self._x = torch.randn(max_tokens, config.dim, generator=torch.Generator().manual_seed(seed)).bfloat16()
        self._turns = 0
        self._token_calls: dict[tuple[int, int], TokenCall] = {}  # by layer and threads

    def turn(self, tokens: int) -> Turn:
        """The next call: the next layer, with experts that were not used for longest."""
        number = self._turns % self.extent.layers
        self._turns += 1
        recorded = self._recorded(number) if tokens == 1 else None
        return self._drawn(number, tokens, recorded)

    def run(self, turn: Turn) -> Tensor:
        """The layer's output, bfloat16 [T, dim]; of one token in memory that the next such call overwrites."""
        if turn.recorded is not None:
            return turn.recorded.run(turn.ids, turn.weights)
        return turn.layer.sync(turn.layer.submit(self._x[: len(turn.ids)], turn.ids, turn.weights))

    def _recorded(self, number: int) -> TokenCall:
        """A layer's call for one token with as many threads as are set now."""
        key = number, thread_count()
        if key not in self._token_calls:
            turn = self._drawn(number, 1)
            self._token_calls[key] = TokenCall(turn.layer, self._x[:1], turn.ids, turn.weights)
        return self._token_calls[key]

    def _drawn(self, number: int, tokens: int, recorded: TokenCall | None = None) -> Turn:
        ids = torch.from_numpy(self._draws[number].draw(tokens))
        weights = torch.from_numpy(self._rng.random(ids.shape, dtype=np.float32))
        weights /= weights.sum(dim=1, keepdim=True)
        return Turn(self.layers[number], self.packed[number], ids, weights, recorded)

    def operations(self, tokens: int) -> int:
        """Additions and multiplications of a call."""
        return 2 * 3 * self.config.dim * self.config.moe_inter_dim * self.config.n_activated_experts * tokens

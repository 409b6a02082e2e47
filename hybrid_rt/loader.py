"""From an opened checkpoint to a model that runs: each part of the model asks for its weights by name."""

import torch

from hybrid_rt.layers import Linear
from hybrid_rt.transformer import Transformer
from offload.backend import Backend
from offload.experts import CpuExperts, ExpertBuffers
from quant.checkpoint import Checkpoint
from quant.formats import QuantTensor


class CheckpointParts:
    """Weights of a checkpoint, in the formats in which they are stored (`Parts`).

    Matrices and experts stay views of the mapped files. Copied in float32 are only the norms, the routers,
    and `wkv_b`, which attention reads in two forms.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, backend: Backend, buffers: ExpertBuffers) -> None:
        self.checkpoint, self.dtype, self.backend, self.buffers = checkpoint, dtype, backend, buffers

    def linear(self, name: str) -> Linear:
        return Linear(self.checkpoint.weight(name))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.checkpoint.weight(name).dequantize(dtype or self.dtype)

    def embedding(self, name: str) -> torch.Tensor:
        return self.checkpoint.weight(name).data

    def experts(self, layer: int) -> CpuExperts:
        weights = [self._expert(layer, expert) for expert in range(self.checkpoint.config.n_routed_experts)]
        return CpuExperts(weights, self.backend, self.buffers)

    def _expert(self, layer: int, expert: int) -> tuple[QuantTensor, QuantTensor, QuantTensor]:
        prefix = f"layers.{layer}.ffn.experts.{expert}"
        w1, w2, w3 = (self.checkpoint.weight(f"{prefix}.{w}") for w in ("w1", "w2", "w3"))
        return w1, w2, w3


def load_transformer(
    checkpoint: Checkpoint, dtype: torch.dtype, backend: Backend, buffers: ExpertBuffers
) -> Transformer:
    """The model of `checkpoint`, for forward passes of as many tokens as `buffers` hold."""
    parts = CheckpointParts(checkpoint, dtype, backend, buffers)
    return Transformer(checkpoint.config, parts, dtype, len(checkpoint.mtp_layers)).eval()

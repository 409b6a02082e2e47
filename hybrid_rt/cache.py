"""The latent cache: what attention keeps of the tokens it has seen."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from offload.backend import Backend
from quant import model_ops
from quant.config import ModelConfig
from quant.operators import with_cpu_kernel

if TYPE_CHECKING:
    from hybrid_rt.token_step import TokenStep


class LatentCache:
    """The normed latent and the turned rope key of every token and layer: [layers, capacity, kv_lora + rope].

    Pages that no token has reached yet take no memory. `length` tokens are valid in all layers.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, backend: Backend) -> None:
        self.data = backend.allocate((config.n_layers, capacity, config.latent_dim), dtype)
        self.length = 0
        self.step: TokenStep | None = None  # a recording of the work of one token on this cache

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.data.shape[1]

    def write(self, layer: int, start: int, latent: torch.Tensor) -> torch.Tensor:
        """Store `latent` [T, kv_lora + rope] of the tokens from `start` on; returns all of the layer up to them."""
        end = start + latent.shape[0]
        copy_rows(self.data[layer, start:end], latent)
        return self.data[layer, :end]

    def rows(self, first: int, end: int) -> dict[str, torch.Tensor]:
        """All that tokens `first` to `end` left here, by name: views [layers, tokens, ...]."""
        return {"latents": self.data[:, first:end]}

    def put(self, first: int, rows: Mapping[str, torch.Tensor]) -> None:
        """Take over what `rows` gave for the tokens from `first` on; they are the last ones then."""
        count = next(iter(rows.values())).shape[1]
        for name, own in self.rows(first, first + count).items():
            own.copy_(rows[name])
        self.length = first + count


@with_cpu_kernel("copy_rows(Tensor(a!) target, Tensor source) -> ()", model_ops.copy_rows)
def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """target [T, columns] = source."""
    target.copy_(source)

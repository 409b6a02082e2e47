"""The latent cache: what attention keeps of the tokens it has seen."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from offload.backend import Backend
from quant import model_ops
from quant.config import ModelConfig
from quant.inventory import CacheFormat, cache_row_bytes
from quant.latents import pack_latents
from quant.operators import with_cpu_kernel
from quant.tape import leave_to_torch

if TYPE_CHECKING:
    from hybrid_rt.graph_step import GraphSteps
    from hybrid_rt.token_step import TokenStep


CACHE_DTYPES: dict[CacheFormat, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.uint8,
}


class LatentCache:
    """The normed latent and the turned rope key of every token and layer: [layers, capacity, kv_lora + rope].

    In 8 bits it is uint8 [layers, capacity, bytes of a row] (quant/latents.py). Pages that no token has reached yet
    take no memory. `length` tokens are valid in all layers.
    """

    def __init__(self, config: ModelConfig, capacity: int, fmt: CacheFormat, backend: Backend) -> None:
        self.lora = config.kv_lora_rank if fmt == "int8" else None  # latents that are packed
        width, dtype = config.latent_dim, CACHE_DTYPES[fmt]
        if fmt == "int8":
            width = cache_row_bytes(config, fmt)
        self.data = backend.allocate((config.n_layers, capacity, width), dtype)
        self.length = 0
        self.step: TokenStep | None = None  # a recording of the work of one token on this cache
        self.graphs: GraphSteps | None = None  # the same on a GPU, for a few tokens

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.data.shape[1]

    def write(self, layer: int, start: int, latent: torch.Tensor) -> torch.Tensor:
        """Store `latent` [T, kv_lora + rope] of the tokens from `start` on; returns all of the layer up to them."""
        end = start + latent.shape[0]
        if self.lora is not None:
            leave_to_torch("an 8-bit cache")
            latent = pack_latents(latent, self.lora)
        copy_rows(self.data[layer, start:end], latent)
        return self.data[layer, :end]

    def write_at(self, layer: int, positions: torch.Tensor, latent: torch.Tensor) -> None:
        """Store `latent` [T, kv_lora + rope] at `positions` [T], which the device knows and the host need not."""
        if self.lora is not None:
            latent = pack_latents(latent, self.lora)
        self.data.select(0, layer).index_copy_(0, positions, latent)

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
    """target [T, columns] = source, of one dtype."""
    target.copy_(source)

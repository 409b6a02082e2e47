"""The small parts that blocks are made of, and where they get their weights."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from quant import model_ops
from quant.formats import QuantTensor
from quant.operators import with_cpu_kernel
from quant.ops import linear


class Experts(Protocol):
    """The routed experts of one layer. Work is submitted, goes on beside other work, and is fetched by sync."""

    def submit(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        """Start the experts `ids` [T, K] on `x` [T, dim]; returns what `sync` takes."""

    def sync(self, pending: Any) -> torch.Tensor:
        """The weighted sum over the chosen experts: [T, dim]."""


class Parts(Protocol):
    """Where a model's weights come from: a checkpoint when it runs, fresh parameters when it is trained.

    Names are those of the inventory (quant/inventory.py).
    """

    def linear(self, name: str) -> nn.Module:
        """A map from [..., columns] to [..., rows] of the matrix `name`."""

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name`, whole: in `dtype`, or in the model's when None."""

    def whole(self, name: str) -> Callable[[], torch.Tensor | QuantTensor]:
        """A call that gives the matrix `name` as attention reads it.

        In float32, kept so or decoded each time where memory is short; packed, uint8 [tiles, blocks, bytes]; or, for
        kernels of a GPU, as it is stored.
        """

    def embedding(self, name: str) -> torch.Tensor:
        """The embedding table `name` [vocab, dim] as it is stored."""

    def experts(self, layer: int) -> Experts:
        """The routed experts of `layer`."""


class Linear(nn.Module):
    """A matrix in its stored format; the operator finds the kernel for (format, device)."""

    def __init__(self, weight: QuantTensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32; so is its weight."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


@with_cpu_kernel("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", model_ops.rms_norm)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, dim] / sqrt(mean of its squares + eps) * weight, in x's dtype."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU: a dense layer's MLP, or the shared experts of a MoE layer."""

    def __init__(self, prefix: str, parts: Parts) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (parts.linear(f"{prefix}.{w}") for w in ("w1", "w2", "w3"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(silu_times(self.w1(x), self.w3(x)))


@with_cpu_kernel("silu_times(Tensor gates, Tensor ups) -> Tensor", model_ops.silu_times)
def silu_times(gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    """silu(gates) * ups."""
    return F.silu(gates) * ups


@with_cpu_kernel("add(Tensor a, Tensor b) -> Tensor", model_ops.add)
def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b, of one shape and dtype."""
    return a + b

"""What the packed formats cost a whole MoE layer: mean|difference| over mean|output| on Gaussian experts.

python -m tools.formats.layer_error [--dim 7168 --inter 2048 --experts 4 --tokens 8]

Activations are quantised as the kernels do: x, and again the hidden state before w2, to 8 bits, with one scale for
128 columns.
Everything else is float32, so the figures are the formats' own.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quant.encoding import encode
from quant.kernels import reference
from quant.packed import PACKED_FORMATS, PackedFormat
from quant.packing import decode

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """Size of a layer of routed experts; every token goes to all of them."""

    dim: int
    inter: int
    experts: int
    tokens: int


def layer_errors(layer: Layer, seed: int = 0) -> dict[str, float]:
    """The relative error of the layer's output, by format."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((layer.tokens, layer.dim), dtype=np.float32)
    shares = rng.uniform(0.1, 1, (layer.experts, layer.tokens, 1)).astype(np.float32)
    exact, quantised = np.zeros_like(x), {name: np.zeros_like(x) for name in PACKED_FORMATS}
    for share, expert in zip(shares, _experts(layer, rng), strict=True):
        exact += share * _expert_output(x, expert, np.asarray)
        for name, fmt in PACKED_FORMATS.items():
            packed = [_round_trip(weight, fmt) for weight in expert]
            quantised[name] += share * _expert_output(x, packed, quantise_activations)
    return {name: float(np.abs(out - exact).mean() / np.abs(exact).mean()) for name, out in quantised.items()}


def _experts(layer: Layer, rng: np.random.Generator) -> Iterator[list[Floats]]:
    """w1, w3 [inter, dim] and w2 [dim, inter] of one expert after the other, N(0, 1) / sqrt(K)."""
    for _ in range(layer.experts):
        shapes = ((layer.inter, layer.dim), (layer.inter, layer.dim), (layer.dim, layer.inter))
        yield [rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[1] ** 0.5) for shape in shapes]


def _expert_output(x: Floats, expert: list[Floats], activations: Callable[[Floats], Floats]) -> Floats:
    """[T, dim]: w2 (silu(w1 x) × (w3 x)), with what `activations` makes of x and of the hidden state."""
    w1, w3, w2 = expert
    seen = activations(x)
    gate, up = seen @ w1.T, seen @ w3.T
    hidden = gate / (1 + np.exp(-gate)) * up
    return activations(hidden) @ w2.T


def _round_trip(weight: Floats, fmt: PackedFormat) -> Floats:
    return decode(encode(torch.from_numpy(weight), fmt).numpy(), fmt, weight.shape)


def quantise_activations(x: Floats) -> Floats:
    """x [T, K] as 8 bits hold it."""
    q, scales = reference.quantise_activations(x)
    return (q.reshape(*scales.shape, -1) * scales[:, :, None]).reshape(len(x), -1)[:, : x.shape[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("dim", 7168), ("inter", 2048), ("experts", 4), ("tokens", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, error in layer_errors(Layer(**vars(parser.parse_args()))).items():
        print(f"{name}: {error:.4f}")


if __name__ == "__main__":
    main()

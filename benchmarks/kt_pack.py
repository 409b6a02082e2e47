"""Has kt-kernel quantise some Gaussian experts, keeps them for kt_layer.py, and tells what that costs in exactness.

It runs in kt-kernel's environment and prints one JSON object: by method, mean|difference| / mean|output| of the layer.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from kt_kernel import kt_kernel_ext as ext

from benchmarks.kt_layer import PACKED_EXPERTS, Layer
from benchmarks.layer_setup import Setup, r1_config
from quant.config import ModelConfig

KINDS = {"AMXINT4": ext.moe.AMXInt4_MOE, "AMXINT8": ext.moe.AMXInt8_MOE}
TOKENS = 8


class Experts:
    """w1, w3 [experts, inter, dim] and w2 [experts, dim, inter], N(0, 1) / sqrt(columns), bfloat16."""

    def __init__(self, config: ModelConfig, count: int) -> None:
        def gaussian(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(count, rows, columns) / columns**0.5).bfloat16()

        self.w1 = gaussian(config.moe_inter_dim, config.dim)
        self.w3 = gaussian(config.moe_inter_dim, config.dim)
        self.w2 = gaussian(config.dim, config.moe_inter_dim)

    def output(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The layer in float32: [T, dim]."""
        out = torch.zeros(x.shape)
        for expert in range(len(self.w1)):
            w1, w3, w2 = (weight[expert].float() for weight in (self.w1, self.w3, self.w2))
            hidden = torch.nn.functional.silu(x.float() @ w1.T) * (x.float() @ w3.T)
            out += (weights * (ids == expert)).sum(dim=1, keepdim=True) * (hidden @ w2.T)
        return out


def pack(method: str, config: ModelConfig, experts: Experts, setup: Setup, folder: Path) -> float:
    """Quantise and save; returns the error."""
    layer = Layer(config, setup, folder)
    options = layer.options
    options.gate_proj, options.up_proj, options.down_proj = (
        weight.data_ptr() for weight in (experts.w1, experts.w3, experts.w2)
    )
    options.path, options.save, options.load = str(folder), True, False
    layer.load(KINDS[method])
    x = torch.randn(setup.max_tokens, config.dim).bfloat16()
    ids = torch.arange(config.n_activated_experts).repeat(len(x), 1)
    weights = 0.1 + 0.9 * torch.rand(ids.shape)
    exact = experts.output(x, ids, weights)
    return float((layer.forward(x, ids, weights).float() - exact).abs().mean() / exact.abs().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    config, setup = r1_config(), Setup(len(os.sched_getaffinity(0)), PACKED_EXPERTS, TOKENS)
    experts = Experts(config, PACKED_EXPERTS)
    print(
        json.dumps({method: pack(method, config, experts, setup, folder) for method in KINDS}), file=replies, flush=True
    )
    os._exit(0)  # kt-kernel's threads never end


if __name__ == "__main__":
    main()

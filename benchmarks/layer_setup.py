"""What both sides of layer.py know. It also runs in kt-kernel's environment, which lacks dsr1's dependencies."""

import argparse
from dataclasses import dataclass

from quant.config import ModelConfig
from quant.shapes import known_shape

GROUP = 32  # weights that share a scale in RAWINT4
GGML_BLOCK = 256  # weights
Q4_K_BYTES, Q6_K_BYTES = 144, 210  # of a block


@dataclass(frozen=True)
class Method:
    """A format of kt-kernel. weight_bytes: of one weight, scales of groups included. copies: held while it loads."""

    bits: int
    weight_bytes: float
    copies: int = 1

    def layer_bytes(self, config: ModelConfig, experts: int) -> int:
        return int(3 * config.dim * config.moe_inter_dim * experts * self.weight_bytes)


METHODS = {
    "AMXINT4": Method(4, 1 / 2),
    "RAWINT4": Method(4, 1 / 2 + 2 / GROUP, copies=3),
    "LLAMAFILE": Method(4, (2 * Q4_K_BYTES + Q6_K_BYTES) / (3 * GGML_BLOCK)),
    "AMXINT8": Method(8, 1),
}


def r1_config() -> ModelConfig:
    """DeepSeek-R1's."""
    shape = known_shape("deepseek-ai/DeepSeek-R1")
    assert shape is not None
    return shape.config


@dataclass(frozen=True)
class Setup:
    """How a layer is run. max_tokens: of a call."""

    threads: int
    experts: int
    max_tokens: int

    def words(self) -> list[str]:
        """The same as words of a command line."""
        return [f"--threads={self.threads}", f"--experts={self.experts}", f"--max-tokens={self.max_tokens}"]


def worker_arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Setup]:
    """What a worker was told, beside what `parser` knows already."""
    for option in ("threads", "experts", "max-tokens"):
        parser.add_argument(f"--{option}", type=int, required=True)
    told = parser.parse_args()
    return told, Setup(told.threads, told.experts, told.max_tokens)

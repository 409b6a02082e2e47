"""A worker: one layer of random experts in one of kt-kernel's formats, in kt-kernel's environment. Run by layer.py.

run M: a call of M tokens.

kt-kernel's Python classes want a GPU (pinned memory), so its C++ module is called, as those classes do it.
"""

import argparse
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import torch
from kt_kernel import kt_kernel_ext as ext

from benchmarks.layer_setup import GROUP, METHODS, Setup, r1_config, worker_arguments
from benchmarks.protocol import Command, Fields, serve, timed
from offload.benchmark.draw import ExpertDraw
from quant.config import ModelConfig

PACKED_EXPERTS = 8  # different ones, which kt_pack.py makes; a layer repeats them, each time in memory of its own
ROW_STEP = 32  # tokens; its buffers hold a multiple
GGML_BFLOAT16 = 30  # ggml's numbers of its types
GGML_TYPES = {"Q4_K": 12, "Q6_K": 14}


class Layer:
    """kt-kernel with a pool of threads. packed: the folder of what kt_pack.py wrote."""

    def __init__(self, config: ModelConfig, setup: Setup, packed: Path) -> None:
        self.experts, self.packed = setup.experts, packed
        self.matrices = {
            "gate": (config.moe_inter_dim, config.dim),
            "up": (config.moe_inter_dim, config.dim),
            "down": (config.dim, config.moe_inter_dim),
        }
        pool = ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [setup.threads]
        self.cpu = ext.CPUInfer(pool)
        self.options = ext.moe.MOEConfig(setup.experts, config.n_activated_experts, config.dim, config.moe_inter_dim, 0)
        self.options.pool, self.options.layer_idx = self.cpu.backend_, 0
        self.options.max_len = ceil(setup.max_tokens / ROW_STEP) * ROW_STEP
        self.kept: list[torch.Tensor] = []  # weights that kt-kernel reads where they are

    def load(self, kind: Any, order: torch.Tensor | None = None) -> None:
        """Have kt-kernel take over the weights that the options tell of. order: the source of each expert."""
        self.moe = kind(self.options)
        order = torch.arange(self.experts) if order is None else order.contiguous()
        self.do(self.moe.load_weights_task(order.data_ptr()))

    def do(self, task: Any) -> None:
        """Run a task to its end."""
        self.cpu.submit(task)
        self.cpu.sync()

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The layer's output, bfloat16 [T, dim]. ids: int64 [T, K]; weights: float32 [T, K]."""
        out, tokens = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        pointers = [tensor.data_ptr() for tensor in (ids, weights, x, out)]
        self.do(self.moe.forward_task(tokens.data_ptr(), ids.shape[1], *pointers, False))
        return out


def load_amx(layer: Layer, kind: Any) -> None:
    """Integers with one scale for each row of a matrix, quantised before by kt-kernel itself."""
    layer.options.path, layer.options.load, layer.options.save = str(layer.packed), True, False
    layer.load(kind, torch.arange(layer.experts) % PACKED_EXPERTS)


def load_raw(layer: Layer) -> None:
    """4-bit integers in groups of 32 with one bfloat16 each; any bits will do."""
    quantisation = layer.options.quant_config
    quantisation.bits, quantisation.group_size, quantisation.zero_point = 4, GROUP, False
    for name, (rows, columns) in layer.matrices.items():
        words = torch.randint(-(2**31), 2**31, (1, rows, columns // 8), dtype=torch.int32)
        weight = words.repeat(layer.experts, 1, 1)
        scale = torch.full((layer.experts, rows, columns // GROUP), 0.2 / columns**0.5, dtype=torch.bfloat16)
        setattr(layer.options, f"{name}_proj", weight.data_ptr())
        setattr(layer.options, f"{name}_scale", scale.data_ptr())
        layer.kept += [weight, scale]
    layer.load(ext.moe.AMXInt4_KGroup_MOE)
    layer.kept.clear()  # it has copies


def load_llamafile(layer: Layer) -> None:
    """The blocks of a Q4_K_M file: Q4_K, and Q6_K for the down projection."""
    layer.options.m_block, layer.options.group_min_len, layer.options.group_max_len = 32, 10, layer.options.max_len
    layer.options.hidden_type = GGML_BFLOAT16
    for name, shape in layer.matrices.items():
        kind = "Q6_K" if name == "down" else "Q4_K"
        weight = ggml_blocks(shape, kind).repeat(layer.experts, 1)
        setattr(layer.options, f"{name}_proj", weight.data_ptr())
        setattr(layer.options, f"{name}_type", GGML_TYPES[kind])
        layer.kept.append(weight)
    layer.load(ext.moe.MOE)


def ggml_blocks(shape: tuple[int, int], kind: str) -> torch.Tensor:
    """A Gaussian matrix in blocks of ggml: uint8 [1, bytes]."""
    values = torch.randn(shape) / shape[1] ** 0.5
    blocks = ext.utils.from_float(values.data_ptr(), values.numel(), getattr(ext.kvcache.ggml_type, kind))
    return torch.as_tensor(bytearray(blocks) if isinstance(blocks, bytes) else blocks, dtype=torch.uint8)[None]


LOADERS: dict[str, Callable[[Layer], None]] = {
    "AMXINT4": lambda layer: load_amx(layer, ext.moe.AMXInt4_MOE),
    "AMXINT8": lambda layer: load_amx(layer, ext.moe.AMXInt8_MOE),
    "RAWINT4": load_raw,
    "LLAMAFILE": load_llamafile,
}


def start(method: str, setup: Setup, packed: Path) -> tuple[Fields, dict[str, Command]]:
    """Load the weights."""
    torch.manual_seed(0)
    torch.set_num_threads(setup.threads)
    config = r1_config()
    layer = Layer(config, setup, packed)
    LOADERS[method](layer)
    expert_bytes = METHODS[method].layer_bytes(config, 1)
    draw = ExpertDraw(setup.experts, config.n_activated_experts, 0)
    x = torch.randn(setup.max_tokens, config.dim).bfloat16()

    def run(tokens: int) -> Fields:
        ids = torch.from_numpy(draw.draw(tokens))
        weights = torch.rand(ids.shape)
        weights /= weights.sum(dim=1, keepdim=True)
        return timed(lambda: layer.forward(x[:tokens], ids, weights), len(torch.unique(ids)) * expert_bytes)

    return {"weight_bytes": setup.experts * expert_bytes}, {"run": run}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--packed", type=Path, required=True)
    told, wanted = worker_arguments(parser)
    serve(lambda: start(told.method, wanted, told.packed))

"""A layer of R1's size on a device "cuda" that is not there: devices, shapes and bytes of the GPU's operators."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrid_rt.cache import LatentCache
from hybrid_rt.gpu_attention import DeviceAttention
from hybrid_rt.layers import Linear
from hybrid_rt.rope import Rope, softmax_scale
from hybrid_rt.transformer import Block
from offload.backend import CpuBackend
from offload.emulate import Ledger
from offload.experts import CpuExperts, ExpertBuffers, PackedExperts
from quant.config import ModelConfig, parse_config
from quant.formats import QuantTensor
from quant.gpu import ops
from quant.inventory import Inventory
from quant.packed import ACCURATE, Q8, ExpertRecord
from tests.tiny_checkpoint import R1, TINY

CONTEXT = 131072
LAYER = 3  # the first one with experts


class Counting(TorchDispatchMode):
    """Counts what operators make on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(2**50)
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        makes = any(value.alias_info is None for value in func._schema.returns)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda" and makes:
                self.ledger.count("temporaries", leaf)
        return out


class FakeParts:
    """Weights of the layer as a plan for 24 GB has them: experts in host memory, all else at 8 bits on the GPU."""

    def __init__(self, config: ModelConfig, max_tokens: int) -> None:
        self.inventory = Inventory.of(config)
        self.backend = CpuBackend("cuda")
        self.buffers = ExpertBuffers(config, self.backend, max_tokens)
        self.record = ExpertRecord(ACCURATE, config.dim, config.moe_inter_dim)
        self.count = config.n_routed_experts

    def _weight(self, name: str) -> QuantTensor:
        shape = tuple(self.inventory.by_name[name].shape)
        return QuantTensor(Q8, shape, torch.empty(Q8.nbytes(shape), dtype=torch.uint8, device="cuda"))

    def linear(self, name: str) -> Linear:
        return Linear(self._weight(name))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self.inventory.by_name[name].shape, dtype=dtype or torch.bfloat16, device="cuda")

    def whole(self, name: str) -> Callable[[], QuantTensor]:
        weight = self._weight(name)
        return lambda: weight

    def embedding(self, name: str) -> torch.Tensor:
        return torch.empty(self.inventory.by_name[name].shape)

    def experts(self, layer: int) -> CpuExperts:
        records = torch.empty(self.count, self.record.nbytes, dtype=torch.uint8)
        return CpuExperts(PackedExperts(records, self.record), self.backend, self.buffers)


def indexed(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """tensor[:, None] and the like, which Python's own `[]` asks the device's library for even on fake tensors."""
    for dim, one in enumerate(index if isinstance(index, tuple) else (index,)):
        if one is None:
            tensor = tensor.unsqueeze(dim)
        elif one == 0:  # the last of the index
            tensor = tensor.select(dim, 0)
        else:
            assert one.step is None, f"{index} is not known here"
            first, end, _ = one.indices(tensor.shape[dim])
            tensor = tensor.narrow(dim, first, end - first)
    return tensor


@contextmanager
def r1_layer(tokens: int, in_bytes: bool) -> Iterator[tuple[Block, Callable[[], torch.Tensor], Counting]]:
    """A layer, a pass of the last `tokens` tokens of the context through it, and the count."""
    config = parse_config({**TINY, **R1})
    with FakeTensorMode(), torch.inference_mode():
        parts = FakeParts(config, tokens)
        block = Block(config, LAYER, parts)
        cache = LatentCache(config, CONTEXT, "bfloat16", parts.backend)
        if in_bytes:
            cache.data = torch.empty(config.n_layers, CONTEXT, 656, dtype=torch.uint8, device="cuda")
        cache.length = CONTEXT - tokens
        rope = Rope(config)
        rope.frequencies = torch.empty(config.qk_rope_head_dim // 2, device="cuda")
        counting = Counting()

        def run() -> torch.Tensor:
            context = DeviceAttention(cache, tokens, softmax_scale(config))
            x = torch.empty(tokens, config.dim, dtype=torch.bfloat16, device="cuda")
            with counting:
                out: torch.Tensor = block(x, rope(context.positions), context)
            return out

        yield block, run, counting


@pytest.mark.parametrize(("tokens", "most"), [(1, 20), (16, 28), (128, 96), (512, 260)])
def test_a_layer_of_r1_at_128k(tokens: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporaries take at most `most` MiB, whatever the context is; a whole score matrix would take up to 16 GiB."""
    monkeypatch.setattr(torch.Tensor, "__getitem__", indexed)
    with r1_layer(tokens, in_bytes=False) as (_, run, counting):
        out = run()
        assert out.shape == (tokens, 7168) and out.dtype == torch.bfloat16 and out.device.type == "cuda"
        peak = counting.ledger.peak / 2**20
        print(f"{tokens} tokens: {peak:.0f} MiB")
        assert peak <= most
        assert "dsr1.gpu_linear.default" in counting.names
        assert ("dsr1.gpu_decode.default" in counting.names) == (tokens <= 128)
        assert ("dsr1.gpu_prefill.default" in counting.names) == (tokens > 128)


def test_operators_refuse_tensors_of_two_devices_and_weights_that_do_not_fit() -> None:
    with FakeTensorMode():
        data = torch.empty(Q8.nbytes((64, 256)), dtype=torch.uint8, device="cuda")
        x, weight = torch.empty(2, 256, dtype=torch.bfloat16), QuantTensor(Q8, (64, 256), data)
        with pytest.raises(ValueError, match="are on cpu and cuda"):
            ops.linear(x, weight)
        there = torch.empty(2, 256, dtype=torch.bfloat16, device="cuda")
        assert ops.linear(there, weight).shape == (2, 64)
        with pytest.raises(ValueError, match="takes .* bytes as q8"):
            ops.linear(torch.empty(2, 384, device="cuda"), QuantTensor(Q8, (64, 384), data))
        cached = torch.empty(10, 100, dtype=torch.bfloat16, device="cuda")
        q = torch.empty(1, 4, 64, dtype=torch.bfloat16, device="cuda")
        wkv_b = QuantTensor(Q8, (4 * 128, 64), torch.empty(Q8.nbytes((512, 64)), dtype=torch.uint8, device="cuda"))
        seen = torch.empty(1, dtype=torch.int32, device="cuda")
        with pytest.raises(ValueError, match="a cache of 64 latents"):
            ops.attend_absorbed(q, q, cached, seen, wkv_b, 1.0)

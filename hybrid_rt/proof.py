"""A plan proved without its machine and without its weights: the model's own code on fake tensors of full size.

    proof = Prover(plan, inventory, formats).run(tokens=512, position=32256)
    proof.gpu_bytes       the most that weights, cache and temporaries took at a time, with the plan's reserves
    proof.crossings       every transfer between host and GPU: (kind, bytes)

Under torch's FakeTensorMode a tensor has a shape, a dtype and a device, and no memory. Operators check devices and tell
the shapes of their results. A dispatch mode counts the storages that live on the device "cuda", and sees each operator
whose inputs and results are on different devices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrid_rt.attention import AttentionContext
from hybrid_rt.cache import LatentCache
from hybrid_rt.gpu_attention import attention_context
from hybrid_rt.loader import load_transformer
from hybrid_rt.rope import softmax_scale
from hybrid_rt.transformer import Transformer
from offload.backend import Stream
from offload.emulate import BUFFERS, EmulatedBackend, Ledger
from offload.experts import ExpertBuffers
from offload.plan import Plan
from quant.inventory import Inventory
from quant.manifest import Manifest
from quant.safetensors_file import DTYPES as STORED_DTYPES
from quant.safetensors_file import SafetensorsFile
from quant.store import Store
from quant.store_formats import StoreFormats
from quant.store_layout import StoreEntry, plan_store

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICE = "cuda:0"
ENOUGH = 2**60  # bytes; the ledger counts, and the plan's budget is compared afterwards


@dataclass(frozen=True)
class Proof:
    """What a pass took. weight_bytes, cache_bytes, workspace_bytes: on the GPU; of the last one the most at a time.

    staging_bytes: of the buffers there that experts are streamed through.
    """

    weight_bytes: int
    cache_bytes: int
    staging_bytes: int
    workspace_bytes: int
    reserve_bytes: int
    crossings: tuple[tuple[str, int], ...]

    @property
    def gpu_bytes(self) -> int:
        """All of it at its most."""
        working = self.cache_bytes + self.staging_bytes + self.workspace_bytes
        return self.weight_bytes + working + self.reserve_bytes

    @property
    def crossing_bytes(self) -> int:
        """Bytes of all transfers."""
        return sum(nbytes for _, nbytes in self.crossings)


class FakeShard:
    """A file of a store that is not there: tensors of its shapes."""

    def __init__(self, entries: tuple[StoreEntry, ...]) -> None:
        self.entries = {entry.name: entry for entry in entries}

    def tensor(self, name: str) -> Tensor:
        entry = self.entries[name]
        return torch.empty(entry.shape, dtype=STORED_DTYPES[entry.dtype])


class FakeDevice(EmulatedBackend):
    """The device "cuda" of fake tensors. crossings: what its copies moved between it and the host."""

    def __init__(self) -> None:
        super().__init__(Ledger(ENOUGH), DEVICE)
        self.crossings: list[tuple[str, int]] = []

    def copy(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        super().copy(dst, src, stream)
        if dst.device != src.device:
            self.crossings.append(("experts", dst.nbytes))

    @contextmanager
    def counting(self) -> Iterator[None]:
        with _Crossing(self), super().counting():  # which takes operators apart before the other sees them
            yield


class _Crossing(TorchDispatchMode):
    """Notes operators between devices. Only a plain copy may be one."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {
            leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor) and leaf.ndim
        }
        if len(devices) > 1 and not self.device.on_host:
            if func is not torch.ops.aten._to_copy.default:
                raise RuntimeError(f"{func} has tensors on {' and '.join(sorted(devices))}")
            self.device.crossings.append(("tensor", args[0].nbytes))
        return out


@contextmanager
def _without_library() -> Iterator[None]:
    """Replace what asks for the device's own library even on fake tensors: Python's `tensor[...]`, and `copy_`."""
    plain = {name: getattr(Tensor, name) for name in ("__getitem__", "copy_")}
    Tensor.__getitem__, Tensor.copy_ = _indexed, _copied  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for name, method in plain.items():
            setattr(Tensor, name, method)


def _copied(target: Tensor, source: Tensor) -> Tensor:
    """target.copy_(source), which makes nothing; within one device."""
    if source.expand_as(target).device != target.device:
        raise RuntimeError(f"copy_ from {source.device} to {target.device}")
    return target


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    if isinstance(index, Tensor):
        return torch.ops.aten.index.Tensor(tensor, [index])
    dim = 0
    for one in index if isinstance(index, tuple) else (index,):
        if one is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(one, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, one.start, one.stop, one.step or 1)
        elif isinstance(one, int):
            tensor = torch.ops.aten.select.int(tensor, dim, one)
            continue
        elif one is Ellipsis:
            dim = tensor.ndim - len([rest for rest in index if rest is not None]) + index.index(one)
        dim += 1
    return tensor


@dataclass
class Prover:
    """The model of a plan on fake tensors; passes of any length at any position. One plan each."""

    plan: Plan
    inventory: Inventory
    formats: StoreFormats
    device: FakeDevice = field(default_factory=FakeDevice)

    def __post_init__(self) -> None:
        self.mode = FakeTensorMode()
        with self.mode, torch.inference_mode(), _without_library():
            self.model, self.cache = self._load()
        used = self.device.ledger.used_by
        self.weight_bytes = sum(taken for label, taken in used.items() if label != BUFFERS)
        self.staging_bytes = used[BUFFERS] - self.cache.data.nbytes

    def _load(self) -> tuple[Transformer, LatentCache]:
        config, plan = self.inventory.config, self.plan
        dtype = DTYPES[plan.dtype]
        buffers = ExpertBuffers(config, self.device, plan.host_tokens)
        model = load_transformer(fake_store(self.inventory, self.formats), plan, dtype, self.device, buffers)
        return model, LatentCache(config, plan.context, plan.cache_format, self.device)

    def run(self, tokens: int, position: int, layers: int | None = None) -> Proof:
        """A pass of `tokens` tokens that follow `position` others, and the logits of the last one.

        layers: how many of the first ones it goes through; by default all.
        """
        ledger, device = self.device.ledger, self.device
        ledger.peak, device.crossings = ledger.used, []
        self.cache.length = position
        with self.mode, torch.inference_mode(), _without_library(), device.counting():
            ids = torch.zeros(tokens, dtype=torch.int64)
            context = attention_context(self.cache, tokens, softmax_scale(self.inventory.config))
            states = self._states(ids, context, layers)
            self.model.head(states[-1:]).float().cpu()
        fixed = self.weight_bytes + self.cache.data.nbytes + self.staging_bytes
        return Proof(
            weight_bytes=self.weight_bytes,
            cache_bytes=self.cache.data.nbytes,
            staging_bytes=self.staging_bytes,
            workspace_bytes=ledger.peak - fixed,
            reserve_bytes=self.plan.reserve_bytes,
            crossings=tuple(device.crossings),
        )

    def _states(self, ids: Tensor, context: AttentionContext, layers: int | None) -> Tensor:
        every = self.model.layers
        self.model.layers = every[:layers]
        try:
            return cast(Tensor, self.model(ids, context))
        finally:
            self.model.layers = every


def fake_store(inventory: Inventory, formats: StoreFormats) -> Store:
    """A store of fake tensors, as `dsr1 quantize` would make it."""
    shards = {name: FakeShard(file.tensors) for name, file in plan_store(inventory, formats).items()}
    manifest = Manifest(formats, inventory.config.n_mtp_layers, {})
    return Store(Path("fake"), inventory.config, inventory, manifest, cast(dict[str, SafetensorsFile], shards))

"""A GPU that is not there: its tensors are on the CPU, and a ledger counts every byte that it would hold.

    backend = EmulatedBackend(Ledger(parse_size("24G")))
    weight = backend.place("attention", mapped)  # of the GPU tier
    cache = backend.allocate(shape, torch.bfloat16)
    with backend.counting():                     # temporaries of a forward pass
        ...

Counted are storages, each once, from the moment it is made until the last view of it is gone. Operators' own scratch is
not: kernels on a GPU have another one.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload.backend import CpuBackend, Stream
from offload.sizes import format_size
from quant.errors import DeviceError

GRANULARITY = 512  # bytes; what CUDA's allocator rounds to
TEMPORARIES = "the workspace"
BUFFERS = "the cache"


class Ledger:
    """Bytes in use under each label, and the most there ever were. `budget`: what may be in use at a time."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = self.peak = 0
        self.used_by: Counter[str] = Counter()
        self.peak_by: Counter[str] = Counter()
        self._storages: dict[int, ref[Any]] = {}  # of the storages that count, by address of their record

    @property
    def left(self) -> int:
        return self.budget - self.used

    def take(self, label: str, nbytes: int, unit: int = GRANULARITY) -> int:
        """Count `nbytes` more, in whole units; returns what to give back.

        Raises DeviceError, and counts nothing, beyond the budget.
        """
        rounded = -(-nbytes // unit) * unit
        if rounded > self.left:
            raise DeviceError(
                f"{label} asks for {format_size(nbytes)} of GPU memory, and {format_size(self.left)} of "
                f"{format_size(self.budget)} are left; give more --gpu-mem or a smaller --context"
            )
        self._add(label, rounded)
        self.peak = max(self.peak, self.used)
        self.peak_by[label] = max(self.peak_by[label], self.used_by[label])
        return rounded

    def give(self, label: str, nbytes: int) -> None:
        """Count `nbytes` less, which `take` returned."""
        self._add(label, -nbytes)

    def _add(self, label: str, nbytes: int) -> None:
        self.used += nbytes
        self.used_by[label] += nbytes

    def count(self, label: str, tensor: Tensor, unit: int = GRANULARITY) -> None:
        """Count the storage of `tensor` until it is freed, unless it counts already. Raises DeviceError as `take`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or not storage.nbytes():
            return
        taken = self.take(label, storage.nbytes(), unit)

        def freed(_: Any) -> None:
            del self._storages[key]
            self.give(label, taken)

        self._storages[key] = ref(storage, freed)


class EmulatedBackend(CpuBackend):
    """A device whose tensors are on the CPU and count in `ledger`; everything runs at once, in the order of calls.

    `device` other than the CPU is for fake tensors: then only those on it count.
    """

    def __init__(self, ledger: Ledger, device: str = "cpu") -> None:
        super().__init__(device)
        self.ledger = ledger
        self.is_host = False  # it has a memory of its own
        self.on_host = False  # whether what runs now would run on the host

    def place(self, label: str, tensor: Tensor) -> Tensor:
        """Count a weight under `label` until it is freed. A view of something larger is copied, as for a device.

        Counted exactly: weights live as long as the model, so they share allocations and nothing is rounded up.
        """
        with self._uncounted():
            moved = tensor.to(self.device)
            alone = moved if moved.untyped_storage().nbytes() == moved.nbytes else moved.clone()
        self.ledger.count(label, alone, unit=1)
        return alone

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        with self._uncounted():
            tensor = super().allocate(shape, dtype, pinned)
        if not pinned:
            self.ledger.count(BUFFERS, tensor)
        return tensor

    def launch(self, stream: Stream, function: Callable[..., Any], *args: Any) -> None:
        with self._uncounted():
            super().launch(stream, function, *args)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what operators make inside as temporaries of the device. Raises DeviceError from the operator."""
        with _Counting(self):
            yield

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        before, self.on_host = self.on_host, True
        try:
            yield
        finally:
            self.on_host = before


class _Counting(TorchDispatchMode):
    """Sees every operator, those that are made of others taken apart, so that no temporary is missed."""

    def __init__(self, backend: EmulatedBackend) -> None:
        super().__init__()
        self.backend = backend

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.backend.on_host:
            return func(*args, **kwargs)
        if _is_composite(func):  # inference mode leaves these whole
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if _makes_storage(func):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.device == self.backend.device:
                    self.backend.ledger.count(TEMPORARIES, leaf)
        return out


@cache
def _is_composite(func: Any) -> bool:
    return func.namespace != "prim" and bool(func._can_decompose())


@cache
def _makes_storage(func: Any) -> bool:
    """Whether an operator returns anything but views of its inputs and the inputs themselves."""
    return any(value.alias_info is None for value in func._schema.returns)

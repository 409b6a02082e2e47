"""Writes down what is queued on a backend, so that offload/order.py can tell whether the order is enough.

backend = RecordingBackend(CpuBackend())
with backend.counting():     # sees the model's own operators, too
    ...
assert not violations(backend.operations)
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload.backend import Backend, Event, Stream


@dataclass(frozen=True)
class Operation:
    """One thing that was queued, or done by the host. `reads`, `writes`: numbers of buffers.

    kind: allocate, copy, launch, record, wait, synchronize, run (an operator of the model), replay (a graph) or free.
    """

    kind: str
    stream: str = ""
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    event: int = -1


@dataclass
class RecordingBackend:
    """Passes everything on to `inner` and notes it in `operations`.

    Buffers are storages, numbered as they appear: views of one have one number. A storage that is made where another
    was freed gets a number of its own.
    """

    inner: Backend
    operations: list[Operation] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)  # of living storages, by address of their record
    _watched: list[ref[Any]] = field(default_factory=list)
    _events: list[Event] = field(default_factory=list)
    _on_host: bool = False  # whether what runs now is host threads' work

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def main(self) -> Stream:
        return self.inner.main

    @property
    def is_host(self) -> bool:
        return False  # so that what a device would be asked for is asked for, and noted

    def buffer(self, tensor: Tensor) -> int:
        """The number of the storage that `tensor` is a view of."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            number = self._numbers[key] = len(self._watched)
            self._watched.append(ref(storage, lambda _: self._freed(key, number)))
        return self._numbers[key]

    def _freed(self, key: int, number: int) -> None:
        del self._numbers[key]
        self.operations.append(Operation("free", self.main.name, writes=(number,)))

    def buffers(self, values: Any) -> tuple[int, ...]:
        """The numbers of all tensors in `values`, each once."""
        return tuple(dict.fromkeys(self.buffer(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)))

    def note(self, kind: str, stream: Stream, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """Write down an operation on tensors."""
        self.operations.append(Operation(kind, stream.name, self.buffers(list(reads)), self.buffers(list(writes))))

    def stream(self, name: str) -> Stream:
        return self.inner.stream(name)

    def event(self) -> Event:
        self._events.append(self.inner.event())
        return self._events[-1]

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        with self.unseen():
            tensor = self.inner.allocate(shape, dtype, pinned)
        self.operations.append(Operation("allocate", writes=(self.buffer(tensor),)))
        return tensor

    def record(self, event: Event, stream: Stream) -> None:
        self.operations.append(Operation("record", stream.name, event=self._events.index(event)))
        self.inner.record(event, stream)

    def wait(self, event: Event, stream: Stream) -> None:
        self.operations.append(Operation("wait", stream.name, event=self._events.index(event)))
        with self.unseen():
            self.inner.wait(event, stream)

    def copy(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        self.note("copy", stream, [src], [dst])
        with self.unseen():
            self.inner.copy(dst, src, stream)

    def launch(self, stream: Stream, function: Callable[..., Any], *args: Any) -> None:
        self.note("launch", stream, *read_and_written(function, args))
        with self.unseen():
            self.inner.launch(stream, function, *args)

    def synchronize(self) -> None:
        self.operations.append(Operation("synchronize"))
        with self.unseen():
            self.inner.synchronize()

    def place(self, label: str, tensor: Tensor) -> Tensor:
        return self.inner.place(label, tensor)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Notes the operators that run inside as work of `main`."""
        with self.inner.counting(), _Seen(self):
            yield

    def unseen(self) -> AbstractContextManager[None]:
        """What runs inside is no operator of the model."""
        return _Unseen(self)


class _Unseen:
    def __init__(self, backend: RecordingBackend) -> None:
        self.backend, self.before = backend, backend._on_host

    def __enter__(self) -> None:
        self.backend._on_host = True

    def __exit__(self, *error: object) -> None:
        self.backend._on_host = self.before


class _Seen(TorchDispatchMode):
    def __init__(self, backend: RecordingBackend) -> None:
        super().__init__()
        self.backend = backend

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.backend._on_host:
            reads, writes = uses(func, args, kwargs, out)
            if reads or writes:
                self.backend.note("run", self.backend.main, reads, writes)
        return out


def uses(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operator read and wrote, its results among these; none of either for views."""
    reads, writes = read_and_written(func, args, kwargs)
    known = {tensor.untyped_storage()._cdata for tensor in (*reads, *writes)}
    results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    made = [tensor for tensor in results if tensor.untyped_storage()._cdata not in known]
    if results and not made and not writes:
        return [], []
    return reads, [*writes, *made]


def read_and_written(function: Any, args: Any, kwargs: Any = None) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a call reads and those that it changes; of what is no operator of torch, all count as both.

    An operator counts as reading also what it changes, unless its schema calls that argument `out`.
    """
    if not isinstance(function, torch._ops.OpOverload):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return tensors, tensors
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for number, argument in enumerate(function._schema.arguments):
        value = args[number] if number < len(args) else (kwargs or {}).get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        changed = argument.alias_info is not None and argument.alias_info.is_write
        (writes if changed else reads).extend(tensors)
    return reads, writes

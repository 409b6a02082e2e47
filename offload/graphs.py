"""Work of the device that is recorded once and then replayed, with the host's part between.

A decoding step is the same every time: only the contents of its fixed input buffers change. On the device it is
recorded as graphs, one between any two calls of the backend's protocol: experts on the CPU begin with `record`, `wait`
and `copy`, and end with `wait` and `copy`, and those the host does itself, each time, in the same order.

    capture    a pass runs once with every operator going into the open graph instead of running; a call of the protocol
               closes the graph and is kept, not made; the next operator opens another graph
    replay     graphs and calls, one after the other

All tensors made during a capture belong to its graphs, and keep their addresses. What is outside must not be freed or
moved: weights, the cache, buffers. A step belongs to one cache for this reason.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from offload.backend import Backend, Event, Stream, check_copy


class Grapher(Protocol):
    """What records a device's work: CUDA's graphs (offload/cuda_backend.py), or a tape of operators in tests."""

    def begin(self) -> None:
        """From here on operators are recorded instead of run."""

    def end(self) -> Callable[[], None]:
        """Stop recording; returns what runs it all on the stream `main`."""


class GraphingBackend:
    """A backend whose work can be captured. Outside of `capture` everything passes on to `inner`."""

    def __init__(self, inner: Backend, grapher: Grapher) -> None:
        self.inner, self.grapher = inner, grapher
        self.pieces: list[Callable[[], None]] | None = None  # of the capture that goes on
        self.is_open = False  # whether a graph is being recorded

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def main(self) -> Stream:
        return self.inner.main

    @property
    def is_host(self) -> bool:
        return self.inner.is_host

    def capture(self, work: Callable[[], Tensor]) -> "CapturedStep":
        """What replays `work`. Whatever it calls for the first time must have run before."""
        pieces: list[Callable[[], None]] = []
        self.pieces = pieces
        try:
            with _Opening(self):
                result = work()
        finally:
            self._close()
            self.pieces = None
        return CapturedStep(pieces, result)

    def open(self) -> None:
        """Begin a graph, unless one is being recorded or nothing is captured."""
        if self.pieces is not None and not self.is_open:
            self.is_open = True
            self.grapher.begin()

    def _close(self) -> None:
        if self.is_open and self.pieces is not None:
            self.is_open = False
            self.pieces.append(self.grapher.end())

    def _do(self, call: Callable[..., None], *args: Any) -> None:
        if self.pieces is None:
            call(*args)
            return
        self._close()
        self.pieces.append(partial(call, *args))

    def record(self, event: Event, stream: Stream) -> None:
        self._do(self.inner.record, event, stream)

    def wait(self, event: Event, stream: Stream) -> None:
        self._do(self.inner.wait, event, stream)

    def copy(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        check_copy(dst, src)
        self._do(self.inner.copy, dst, src, stream)

    def launch(self, stream: Stream, function: Callable[..., Any], *args: Any) -> None:
        self._do(self.inner.launch, stream, function, *args)

    def synchronize(self) -> None:
        if self.pieces is not None:
            raise RuntimeError("a captured step cannot wait for the device")
        self.inner.synchronize()

    def stream(self, name: str) -> Stream:
        return self.inner.stream(name)

    def event(self) -> Event:
        return self.inner.event()

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        self.open()
        return self.inner.allocate(shape, dtype, pinned)

    def place(self, label: str, tensor: Tensor) -> Tensor:
        return self.inner.place(label, tensor)

    def counting(self) -> AbstractContextManager[None]:
        return self.inner.counting()


class CapturedStep:
    """Graphs and calls in their order. `result`: where every replay leaves it; the next one overwrites it."""

    def __init__(self, pieces: list[Callable[[], None]], result: Tensor) -> None:
        self.pieces, self.result = pieces, result

    def replay(self) -> Tensor:
        """Run the step once more."""
        for piece in self.pieces:
            piece()
        return self.result


class _Opening(TorchDispatchMode):
    """Opens a graph before the first operator after a call of the protocol."""

    def __init__(self, backend: GraphingBackend) -> None:
        super().__init__()
        self.backend = backend

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.backend.open()
        return func(*args, **(kwargs or {}))

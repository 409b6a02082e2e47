"""What orders work between the model's device and the host, as an object that can be exchanged.

    A stream is a queue: what is put on it runs in that order. Different streams know of each other only through events:
        record(event, stream)   the event is reached when all that `stream` was given so far is done
        wait(event, stream)     what `stream` is given from here on starts after the event is reached
    The host thread that queues the work waits for nothing but `synchronize`; where host threads have work on a
    stream, it may also wait for that before it queues what comes after it (offload/cuda_backend.py).

The model's own operators run on the stream `main`. `copy` and `launch` read their tensors when their turn comes:
whoever queues them keeps the tensors alive, and unchanged by other streams, until an event says that they are done.
offload/recording.py writes down what is queued, and offload/order.py finds what has no order.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from offload.memory import huge_memory

HUGE_BYTES = 8 * 2**20  # host buffers from here on are in huge pages: kernels walk over many rows of them at a time


def in_fake_mode() -> bool:
    """Whether tensors that are made now are fake."""
    return is_fake(torch.empty(0))


@dataclass(frozen=True, eq=False)
class Stream:
    """A queue of work. `handle`: what the backend keeps behind it."""

    name: str
    handle: Any = None


@dataclass(frozen=True, eq=False)
class Event:
    """A point in a stream that other streams can wait for; may be recorded again and again."""

    handle: Any = None


class Backend(Protocol):
    """A device and its order of work."""

    @property
    def device(self) -> torch.device:
        """Where the model's tensors live."""

    @property
    def main(self) -> Stream:
        """The stream of the model's own operators."""

    @property
    def is_host(self) -> bool:
        """Whether the device is the host itself: one memory, and all work runs at once on the caller's thread."""

    def stream(self, name: str) -> Stream:
        """A new stream beside `main`."""

    def event(self) -> Event:
        """A new event, not yet recorded; to wait for it then is to wait for nothing."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """Uninitialised memory: on the device, or (pinned) on the host where copies can run beside other work."""

    def record(self, event: Event, stream: Stream) -> None:
        """Let `event` be reached when all work given to `stream` so far is done."""

    def wait(self, event: Event, stream: Stream) -> None:
        """Let the work given to `stream` from here on start after the last recording of `event` is reached."""

    def copy(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        """Queue dst = src, of one shape and dtype, between host and device or within one of them."""

    def launch(self, stream: Stream, function: Callable[..., Any], *args: Any) -> None:
        """Queue a call that runs on host threads and reads or writes the tensors among `args`.

        An error that it raises reaches the caller here or from a later `synchronize`.
        """

    def synchronize(self) -> None:
        """Return when all work of all streams is done."""

    def place(self, label: str, tensor: Tensor) -> Tensor:
        """`tensor`, a weight on the host, where the model's operators can read it for as long as it lives.

        label: the component that it belongs to. Raises DeviceError when the device has no room for it.
        """

    def counting(self) -> AbstractContextManager[None]:
        """Around a forward pass: lets a backend that keeps count of the device's memory see the temporaries."""


class CpuBackend:
    """Everything runs at once, on the caller's thread: the order of calls is the order of work.

    `device` other than the CPU is for fake tensors, which are nowhere.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device, self.main = torch.device(device), Stream("main")
        self.is_host = self.device.type == "cpu"

    def stream(self, name: str) -> Stream:
        return Stream(name)

    def event(self) -> Event:
        return Event()

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        nbytes = prod(shape) * dtype.itemsize
        if pinned and nbytes >= HUGE_BYTES and not in_fake_mode():
            return huge_memory(nbytes).view(dtype).view(shape)
        return torch.empty(shape, dtype=dtype, device="cpu" if pinned else self.device)

    def record(self, event: Event, stream: Stream) -> None:
        pass

    def wait(self, event: Event, stream: Stream) -> None:
        pass

    def copy(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        check_copy(dst, src)
        if not is_fake(dst):  # torch asks for the device's own library even when both are fake
            dst.copy_(src)

    def launch(self, stream: Stream, function: Callable[..., Any], *args: Any) -> None:
        function(*args)

    def synchronize(self) -> None:
        pass

    def place(self, label: str, tensor: Tensor) -> Tensor:
        return tensor

    def counting(self) -> AbstractContextManager[None]:
        return nullcontext()


def check_copy(dst: Tensor, src: Tensor) -> None:
    if dst.shape != src.shape or dst.dtype != src.dtype:
        raise ValueError(
            f"a copy keeps shape and dtype: {src.dtype} {tuple(src.shape)} does not fit {dst.dtype} {tuple(dst.shape)}"
        )

"""NVIDIA's GPUs behind the backend's protocol. It has not run on hardware yet; tests/gpu/ waits for some.

Streams and events are CUDA's. Work of host threads (`launch`) is put in a stream's order like this:

    launch     records a CUDA event on the stream and hands the call to a worker thread, which waits for that event
               first: everything that the stream was given before is done when the call begins. There is one such
               thread, so host work behind other host work waits for it there, and nobody else does
    record     remembers the stream's host work with the event
    wait,      on an event or a stream with host work ahead of it, let the calling thread wait for the worker, because a
    copy       GPU cannot; then they queue theirs. So the caller queues all that may run beside host work first:
               CpuExperts.submit, the shared expert, then sync.

Errors of host work are raised in the thread that waits for it. Pinned memory lets copies run beside kernels; it is
taken once, for buffers that live as long as the model.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from offload.backend import Event, Stream, check_copy
from offload.sizes import format_size
from quant.errors import DeviceError


class CudaBackend:
    """One GPU. budget: bytes that weights, cache and temporaries may take together, without CUDA's own."""

    is_host = False

    def __init__(self, budget: int, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        _, total = torch.cuda.mem_get_info(self.device)
        # torch's own allocator refuses what passes the budget, also on a larger card
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), self.device)
        self.budget = budget
        self.main = Stream("main", torch.cuda.Stream(self.device))
        torch.cuda.set_stream(self.main.handle)  # graphs cannot be captured on the default stream
        self._worker = ThreadPoolExecutor(1, "dsr1-host-work")
        self._host_work: dict[Stream, Future[Any]] = {}  # the last on each stream
        self._before_event: dict[Event, Future[Any]] = {}

    def stream(self, name: str) -> Stream:
        return Stream(name, torch.cuda.Stream(self.device))

    def event(self) -> Event:
        return Event(torch.cuda.Event())

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        if pinned:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        with self._told():
            return torch.empty(shape, dtype=dtype, device=self.device)

    def record(self, event: Event, stream: Stream) -> None:
        event.handle.record(stream.handle)
        work = self._host_work.get(stream)
        if work is None:
            self._before_event.pop(event, None)
        else:
            self._before_event[event] = work

    def wait(self, event: Event, stream: Stream) -> None:
        work = self._before_event.get(event)
        if work is not None:
            work.result()
        stream.handle.wait_event(event.handle)

    def copy(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        check_copy(dst, src)
        self._finish_host_work(stream)
        with torch.cuda.stream(stream.handle):
            dst.copy_(src, non_blocking=True)

    def launch(self, stream: Stream, function: Callable[..., Any], *args: Any) -> None:
        before = self._host_work.get(stream)
        ready = torch.cuda.Event()
        ready.record(stream.handle)

        def work() -> None:
            if before is not None:
                before.result()  # it is done, as the thread is one; its error is this work's, too
            ready.synchronize()
            with torch.inference_mode():
                function(*args)

        self._host_work[stream] = self._worker.submit(work)

    def _finish_host_work(self, stream: Stream) -> None:
        """Let the calling thread wait until host threads have done their work on `stream`."""
        work = self._host_work.pop(stream, None)
        if work is not None:
            work.result()

    def synchronize(self) -> None:
        pending, self._host_work = self._host_work, {}
        self._before_event.clear()
        for work in pending.values():
            work.result()
        torch.cuda.synchronize(self.device)

    def place(self, label: str, tensor: Tensor) -> Tensor:
        with self._told(label):
            return tensor.to(self.device)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a forward pass: its operators run on `main`, in whatever thread the caller is."""
        with torch.cuda.stream(self.main.handle), self._told("the workspace"):
            yield

    @contextmanager
    def _told(self, label: str = "the cache") -> Iterator[None]:
        """Say in a sentence that memory is short."""
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            taken = torch.cuda.memory_reserved(self.device)
            raise DeviceError(
                f"{label} does not fit: {format_size(taken)} of GPU memory are taken and the budget is "
                f"{format_size(self.budget)}; give more --gpu-mem or a smaller --context"
            ) from error


class CudaGrapher:
    """CUDA graphs on the stream `main`, which share one pool of memory: they are replayed in the order of capture."""

    def __init__(self, backend: CudaBackend) -> None:
        self.backend = backend
        self.pool = torch.cuda.graph_pool_handle()
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        # host work may go on in another thread, so only this one's calls are watched
        self.graph = torch.cuda.CUDAGraph()
        self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        graph, self.graph = self.graph, None
        assert graph is not None, "begin comes before end"
        graph.capture_end()
        return graph.replay

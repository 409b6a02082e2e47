"""The CUDA backend's order of host work and its budget, with torch's CUDA calls replaced by ones that note them."""

import threading
from typing import Any

import pytest
import torch

from offload.cuda_backend import CudaBackend
from quant.errors import DeviceError

GIB = 2**30


class FakeEvent:
    """Reached at once, as on a device without a queue, unless a test holds it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def record(self, stream: Any) -> None:
        stream.log.append("record")

    def synchronize(self) -> None:
        assert self.gate.wait(30)


class FakeStream:
    def __init__(self, device: Any) -> None:
        self.log: list[str] = []

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append("wait")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    fractions: list[float] = []
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (80 * GIB, 96 * GIB))
    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    monkeypatch.setattr(cuda, "Stream", FakeStream)
    monkeypatch.setattr(cuda, "Event", FakeEvent)
    monkeypatch.setattr(cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(cuda, "memory_reserved", lambda device: 23 * GIB)
    made = CudaBackend(24 * GIB)
    assert fractions == [24 / 96]
    return made


def test_a_copy_behind_host_work_waits_for_it(backend: CudaBackend) -> None:
    side, done = backend.stream("side"), backend.event()
    host, out = torch.zeros(3), torch.zeros(3)
    hold = threading.Event()
    backend.launch(side, lambda: (hold.wait(30), host.add_(1)))
    threading.Timer(0.05, hold.set).start()
    backend.record(done, side)
    backend.wait(done, backend.main)
    backend.copy(out, host, backend.main)
    assert out.tolist() == [1, 1, 1]
    assert side.handle.log == ["record", "record"] and backend.main.handle.log == ["wait"]


def test_host_work_waits_for_what_its_stream_was_given_before(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = FakeEvent()
    held.gate.clear()
    monkeypatch.setattr(torch.cuda, "Event", lambda: held)
    side, ran = backend.stream("side"), threading.Event()
    backend.launch(side, ran.set)
    assert not ran.wait(0.05)
    held.gate.set()
    backend.synchronize()
    assert ran.is_set()


def test_host_work_of_other_streams_is_not_waited_for(backend: CudaBackend) -> None:
    side, other, hold = backend.stream("side"), backend.stream("other"), threading.Event()
    backend.launch(side, hold.wait, 30)
    out = torch.zeros(2)
    backend.copy(out, torch.ones(2), other)
    assert out.tolist() == [1, 1]
    hold.set()
    backend.synchronize()


def test_host_work_behind_host_work_keeps_nobody_waiting(backend: CudaBackend) -> None:
    """It runs in its turn; the caller goes on, and learns of the first one's error from the second."""
    side, done, hold = backend.stream("side"), backend.event(), threading.Event()
    ran: list[int] = []
    backend.launch(side, lambda: (hold.wait(30), ran.append(1)))
    backend.launch(side, ran.append, 2)
    backend.record(done, side)
    assert ran == []
    hold.set()
    backend.wait(done, backend.main)
    assert ran == [1, 2]
    backend.launch(side, ran.index, 3)
    backend.launch(side, ran.append, 4)
    backend.record(done, side)
    with pytest.raises(ValueError, match="not in list"):
        backend.wait(done, backend.main)
    assert ran == [1, 2]


def test_errors_of_host_work_reach_the_caller(backend: CudaBackend) -> None:
    def fail() -> None:
        raise IndexError("told")

    side, done = backend.stream("side"), backend.event()
    backend.launch(side, fail)
    backend.record(done, side)
    with pytest.raises(IndexError, match="told"):
        backend.wait(done, backend.main)


def test_short_memory_is_told_in_a_sentence(backend: CudaBackend) -> None:
    says = r"the workspace does not fit: 23.0 GiB .* the budget is 24.0 GiB; give more"
    with pytest.raises(DeviceError, match=says), backend.counting():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

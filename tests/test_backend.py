"""The CPU backend, and the recorder that tests of the order of work stand on."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from offload.backend import Backend, CpuBackend
from offload.recording import Operation, RecordingBackend


def test_cpu_backend_runs_in_the_order_of_calls() -> None:
    backend: Backend = CpuBackend()
    side, ready = backend.stream("side"), backend.event()
    source, middle, result = (backend.allocate((3,), torch.float32) for _ in range(3))
    source.fill_(2)
    backend.copy(middle, source, side)
    backend.launch(side, torch.mul, middle, 5)
    backend.launch(side, middle.mul_, 5)
    backend.record(ready, side)
    backend.wait(ready, backend.main)
    backend.copy(result, middle, backend.main)
    backend.synchronize()
    assert result.tolist() == [10, 10, 10]


def test_a_launched_error_reaches_the_caller() -> None:
    def fail() -> None:
        raise IndexError("told")

    with pytest.raises(IndexError, match="told"):
        CpuBackend().launch(CpuBackend().main, fail)


@pytest.mark.parametrize("src", [torch.zeros(4), torch.zeros(3, dtype=torch.float64), torch.zeros(1)])
def test_copies_keep_shape_and_dtype(src: torch.Tensor) -> None:
    backend = CpuBackend()
    with pytest.raises(ValueError, match="keeps shape and dtype"):
        backend.copy(torch.zeros(3), src, backend.main)


def test_pinned_memory_is_on_the_host_and_other_memory_on_the_device() -> None:
    with FakeTensorMode():
        backend = CpuBackend("cuda")
        assert backend.allocate((2, 3), torch.bfloat16).device.type == "cuda"
        pinned = backend.allocate((2, 3), torch.bfloat16, pinned=True)
        assert pinned.device.type == "cpu" and pinned.shape == (2, 3) and pinned.dtype == torch.bfloat16


def test_recording_keeps_order_buffers_streams_and_events() -> None:
    backend = RecordingBackend(CpuBackend())
    side, first, second = backend.stream("side"), backend.event(), backend.event()
    a, b = backend.allocate((4,), torch.float32), backend.allocate((4,), torch.float32, pinned=True)
    outside = torch.ones(2)
    backend.copy(a[2:], outside, backend.main)
    backend.record(second, backend.main)
    backend.wait(second, side)
    backend.copy(b[:2], a[2:], side)
    backend.launch(side, torch.add, a, b)
    backend.record(first, side)
    backend.synchronize()
    assert b[:2].tolist() == [1, 1]
    assert backend.buffer(outside) == 2
    assert backend.operations == [
        Operation("allocate", writes=(0,)),
        Operation("allocate", writes=(1,)),
        Operation("copy", "main", (2,), (0,)),
        Operation("record", "main", event=1),
        Operation("wait", "side", event=1),
        Operation("copy", "side", (0,), (1,)),
        Operation("launch", "side", (0, 1), (0, 1)),
        Operation("record", "side", event=0),
        Operation("synchronize"),
    ]

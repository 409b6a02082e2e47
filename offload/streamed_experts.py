"""Routed experts whose weights stream from RAM to the device, for prompts so long that this beats the CPU.

A layer of R1 is 5.9 GiB, so it goes in slices of at most 16 experts, through two pinned buffers on the host and two on
the device. Of three streams each does its own: `gather` copies records into pinned memory, by host threads, `upload`
copies these to the device, `main` multiplies. For slice n, whose buffers are those of slice n - 2:

    gather   wait   uploaded     the pinned buffer's last slice has gone to the device
             launch the copy of the records
             record gathered
    upload   wait   gathered
             wait   consumed     the device buffer's last slice has been multiplied
             copy   pinned to device
             record uploaded
    main     wait   uploaded
             the experts of the slice, added to those before
             record consumed

So the gathering of slice n runs beside the upload of slice n - 1 and the products of slice n - 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.backend import Backend
from offload.experts import PackedExperts
from quant.gpu import ops
from quant.packed import ExpertRecord

SLICE = 16  # experts
SLOTS = 2


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second. ram, link: bytes of the host's memory and of PCIe. cpu, gpu: operations."""

    ram: float
    link: float
    cpu: float
    gpu: float


def streaming_pays(tokens: int, top_k: int, experts: int, record: ExpertRecord, rates: Rates) -> bool:
    """Whether a chunk's routed experts of one layer are done sooner by streaming all of them than on the CPU.

    Streaming reads and writes host memory for the gathering and reads it for the upload; its three parts overlap, so
    the slowest counts, and the first slice's gathering and upload besides, which nothing hides. The CPU reads each
    weight once and computes; the slower counts.
    """
    weights = experts * record.nbytes
    operations = 2 * 3 * record.dim * record.inter_dim * tokens * top_k
    touched = weights * (1 - (1 - top_k / experts) ** tokens)  # by tokens that choose evenly
    on_cpu = max(touched / rates.ram, operations / rates.cpu)
    ahead = min(SLICE, experts) * record.nbytes * (2 / rates.ram + 1 / rates.link)
    streamed = ahead + max(3 * weights / rates.ram, weights / rates.link, operations / rates.gpu)
    return streamed < on_cpu


class _Slot:
    """A pair of buffers and what is known of them."""

    def __init__(self, backend: Backend, record: ExpertRecord, experts: int) -> None:
        shape = (experts, record.nbytes)
        self.pinned = backend.allocate(shape, torch.uint8, pinned=True)
        self.device = backend.allocate(shape, torch.uint8)
        self.gathered, self.uploaded, self.consumed = (backend.event() for _ in range(3))


class Staging:
    """The buffers, streams and events that all layers share. size: experts in a slice."""

    def __init__(self, backend: Backend, record: ExpertRecord, size: int = SLICE) -> None:
        self.backend, self.record, self.size = backend, record, size
        self.slots = [_Slot(backend, record, size) for _ in range(SLOTS)]
        self.gather, self.upload = backend.stream("gather"), backend.stream("upload")
        self.turn = 0

    def next_slot(self) -> _Slot:
        """The buffers that were used longest ago."""
        self.turn += 1
        return self.slots[self.turn % SLOTS]


class StreamedExperts:
    """The routed experts of one layer, which stay in host memory."""

    def __init__(self, weights: PackedExperts, staging: Staging) -> None:
        self.weights, self.staging = weights, staging

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over each token's experts `ids` [T, K]: float32 [T, dim], on the device of x [T, dim]."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        ready: list[tuple[int, int, _Slot]] = []
        for first, count in self._slices():
            ready.append((first, count, self._send(first, count)))
            if len(ready) == SLOTS:  # the slice before is on its way: now it may be waited for
                self._add(total, x, ids, weights, *ready.pop(0))
        for first, count, slot in ready:
            self._add(total, x, ids, weights, first, count, slot)
        return total

    def _slices(self) -> Iterator[tuple[int, int]]:
        experts, size = len(self.weights.records), self.staging.size
        for first in range(0, experts, size):
            yield first, min(size, experts - first)

    def _send(self, first: int, count: int) -> _Slot:
        staging = self.staging
        backend, slot = staging.backend, staging.next_slot()
        backend.wait(slot.uploaded, staging.gather)
        records = self.weights.records.narrow(0, first, count)
        backend.launch(staging.gather, torch.ops.aten.copy_.default, slot.pinned.narrow(0, 0, count), records)
        backend.record(slot.gathered, staging.gather)
        backend.wait(slot.gathered, staging.upload)
        backend.wait(slot.consumed, staging.upload)
        backend.copy(slot.device.narrow(0, 0, count), slot.pinned.narrow(0, 0, count), staging.upload)
        backend.record(slot.uploaded, staging.upload)
        return slot

    def _add(self, total: Tensor, x: Tensor, ids: Tensor, weights: Tensor, first: int, count: int, slot: _Slot) -> None:
        backend = self.staging.backend
        backend.wait(slot.uploaded, backend.main)
        inside = (ids >= first) & (ids < first + count)
        here = torch.where(inside, ids - first, -1).to(torch.int32)
        total.add_(ops.experts_here(x, here, weights, slot.device.narrow(0, 0, count), self.weights.record))
        backend.record(slot.consumed, backend.main)

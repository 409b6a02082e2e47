"""Routed experts whose weights stream from RAM to the device, for passes so long that this beats the CPU.

A layer of R1 is 5.9 GiB, so it goes in slices of a few experts, through two pinned buffers on the host and two on the
device. Of three streams each does its own: `gather` copies records into pinned memory, by host threads, `upload` copies
these to the device, `main` multiplies. For slice n, whose buffers are those of slice n - 2:

    gather   wait   uploaded     the pinned buffer's last slice has gone to the device
             launch the copies of the records
             record gathered
    upload   wait   gathered
             wait   consumed     the device buffer's last slice has been multiplied
             copy   pinned to device
             record uploaded
    main     wait   uploaded
             the experts of the slice, added to those before
             record consumed

`submit` begins to gather the first slice, `sync` does the rest. The caller's thread queues the gathering of slice
n + 1 before it waits for that of slice n; so this runs beside the upload of slice n and the products of slice n - 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.backend import Backend
from offload.device_experts import ELSEWHERE, DeviceExperts
from offload.experts import CpuExperts, PackedExperts
from offload.node_experts import NodeExperts, split_records
from offload.plan import STAGING_SLOTS, Range


class _Slot:
    """A pair of buffers and what is known of them."""

    def __init__(self, backend: Backend, nbytes: int) -> None:
        self.pinned = backend.allocate((nbytes,), torch.uint8, pinned=True)
        self.device = backend.allocate((nbytes,), torch.uint8)
        self.gathered, self.uploaded, self.consumed = (backend.event() for _ in range(3))


class Staging:
    """The buffers, streams and events that all layers share. size: experts in a slice.

    record_bytes: of the largest record. experts: of a layer, all of them.
    """

    def __init__(self, backend: Backend, record_bytes: int, experts: int, size: int) -> None:
        self.backend, self.size = backend, size
        self.slots = [_Slot(backend, size * record_bytes) for _ in range(STAGING_SLOTS)]
        self.gather, self.upload = backend.stream("gather"), backend.stream("upload")
        self.numbers = backend.place("expert slots", torch.arange(experts + 1))  # the last one is in no slice

    def next_slot(self) -> _Slot:
        """The buffers that were used longest ago."""
        self.slots.reverse()
        return self.slots[0]


@dataclass(frozen=True, eq=False)
class StreamedPending:
    """Inputs of a pass: x [T, dim], ids and weights [T, K]. slot: where the first slice is gathered."""

    inputs: tuple[Tensor, Tensor, Tensor]
    slot: _Slot


class StreamedExperts:
    """Routed experts of one layer, those in `ranges`, which stay in host memory."""

    def __init__(self, weights: PackedExperts | NodeExperts, ranges: Sequence[Range], staging: Staging) -> None:
        self.weights, self.record, self.staging = weights, weights.record, staging
        size = staging.size
        self.slices = [(at, min(size, end - at)) for first, end in ranges for at in range(first, end, size)]

    def submit(self, x: Tensor, ids: Tensor, weights: Tensor) -> StreamedPending:
        """Start with the experts `ids` [T, K], -1 for those elsewhere, on x [T, dim] with `weights` [T, K]."""
        nobody = len(self.staging.numbers) - 1
        return StreamedPending((x, torch.where(ids < 0, nobody, ids), weights), self._gathering(*self.slices[0]))

    def sync(self, pending: StreamedPending) -> Tensor:
        """The weighted sum over each token's experts: [T, dim] in the dtype of submit's x, on its device."""
        x, slot = pending.inputs[0], pending.slot
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number, (first, count) in enumerate(self.slices):
            following = self.slices[number + 1 : number + 2]
            after = self._gathering(*following[0]) if following else slot
            self._upload(slot, count)
            total.add_(self._product(pending, slot, first, count))
            self.staging.backend.record(slot.consumed, self.staging.backend.main)
            slot = after
        return total.to(x.dtype)

    def _gathering(self, first: int, count: int) -> _Slot:
        backend, staging, slot = self.staging.backend, self.staging, self.staging.next_slot()
        backend.wait(slot.uploaded, staging.gather)
        for target, source in self._pieces(self._records(slot.pinned, count), first, count):
            backend.launch(staging.gather, torch.ops.aten.copy_.default, target, source)
        backend.record(slot.gathered, staging.gather)
        return slot

    def _pieces(self, target: Tensor, first: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What is copied where, for `target` to hold the records of a slice."""
        if isinstance(self.weights, PackedExperts):
            yield target, self.weights.records.narrow(0, first, count)
            return
        parts = self.weights.parts
        for part, share in zip(parts, split_records(self.record, len(parts)), strict=True):
            for piece in share.pieces:
                if piece.nbytes:
                    source = part.narrow(0, first, count).narrow(1, piece.place, piece.nbytes)
                    yield target.narrow(1, piece.begin, piece.nbytes), source

    def _upload(self, slot: _Slot, count: int) -> None:
        backend, staging = self.staging.backend, self.staging
        backend.wait(slot.gathered, staging.upload)
        backend.wait(slot.consumed, staging.upload)
        backend.copy(self._records(slot.device, count), self._records(slot.pinned, count), staging.upload)
        backend.record(slot.uploaded, staging.upload)

    def _product(self, pending: StreamedPending, slot: _Slot, first: int, count: int) -> Tensor:
        """float32 [T, dim]: of the experts of a slice."""
        backend, places = self.staging.backend, self.staging.numbers - first
        backend.wait(slot.uploaded, backend.main)
        slots = torch.where((places >= 0) & (places < count), places, ELSEWHERE)
        x, ids, weights = pending.inputs
        return DeviceExperts(self._records(slot.device, count), slots, self.record).run(x, ids, weights)

    def _records(self, buffer: Tensor, count: int) -> Tensor:
        """uint8 [count, bytes of a record] at the start of a buffer."""
        nbytes = self.record.nbytes
        return buffer.narrow(0, 0, count * nbytes).view(count, nbytes)


@dataclass(frozen=True, eq=False)
class HostExperts:
    """The routed experts of one layer in RAM: computed there, or in passes of `from_tokens` and more streamed."""

    cpu: CpuExperts
    streamed: StreamedExperts
    from_tokens: int

    def submit(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[CpuExperts | StreamedExperts, Any]:
        """As CpuExperts.submit."""
        chosen = self.streamed if x.shape[0] >= self.from_tokens else self.cpu
        return chosen, chosen.submit(x, ids, weights)

    def sync(self, pending: tuple[CpuExperts | StreamedExperts, Any]) -> Tensor:
        """As CpuExperts.sync."""
        chosen, submitted = pending
        return chosen.sync(submitted)

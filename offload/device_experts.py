"""Routed experts on the model's device: whole layers, or some of a layer's experts beside those on the CPU.

    submit  the device looks up which of each token's experts it has; the others' ids go to the CPU, its own as -1,
            which the CPU skips; then it runs its own, while the CPU runs the rest
    sync    the CPU's sum is added

Sums are float32 until then, so a token's experts are added in another order than on a CPU alone.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from offload.workspace import TOKENS_ON_DEVICE, device_experts_bytes
from quant.gpu import ops as gpu_ops
from quant.ops import moe_scratch_sizes
from quant.packed import EXPERT_FORMATS, ExpertRecord, expert_record

ELSEWHERE = -1  # the slot of an expert that the device does not have, and an id that the CPU's kernel skips

_library = torch.library.Library("dsr1", "FRAGMENT")
_library.define(
    "device_experts(Tensor x, Tensor ids, Tensor weights, Tensor slots, Tensor records, str format, int inter_dim) "
    "-> Tensor"
)


@dataclass(frozen=True, eq=False)
class DeviceExperts:
    """records: uint8 [n, record.nbytes] on the device. slots: int64 [E], which record an expert is, or -1."""

    records: Tensor
    slots: Tensor
    record: ExpertRecord

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """float32 [T, dim]: the weighted sum over those of a token's experts `ids` [T, K] that are here."""
        form = (self.record.format_name, self.record.inter_dim)
        out: Tensor = torch.ops.dsr1.device_experts.default(x, ids, weights, self.slots, self.records, *form)
        return out

    def elsewhere(self, ids: Tensor) -> Tensor:
        """`ids` with -1 for the experts that are here."""
        return torch.where(self.slots[ids] == ELSEWHERE, ids, ELSEWHERE)


class InRam(Protocol):
    """Experts of a layer that are in RAM: CpuExperts (offload/experts.py), HostExperts (streamed_experts.py)."""

    def submit(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        """Start the experts `ids` [T, K] on x [T, dim] with `weights` [T, K]; -1 for those elsewhere."""

    def sync(self, pending: Any) -> Tensor:
        """The weighted sum over each token's experts: [T, dim]."""


@dataclass(frozen=True, eq=False)
class SplitPending:
    """Submitted work. here: the device's sum, float32 [T, dim]."""

    here: Tensor
    there: Any
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class SplitExperts:
    """The routed experts of one layer, some on the device and the rest in RAM; `host` None: all on the device."""

    device: DeviceExperts
    host: InRam | None

    def submit(self, x: Tensor, ids: Tensor, weights: Tensor) -> SplitPending:
        """Start the experts `ids` [T, K] on x [T, dim] with `weights` [T, K]."""
        there = None if self.host is None else self.host.submit(x, self.device.elsewhere(ids), weights)
        return SplitPending(self.device.run(x, ids, weights), there, x.dtype)

    def sync(self, pending: SplitPending) -> Tensor:
        """The weighted sum over each token's experts: [T, dim] in the dtype of submit's x."""
        if self.host is None or pending.there is None:
            return pending.here.to(pending.dtype)
        return (pending.here + self.host.sync(pending.there)).to(pending.dtype)


def _check(x: Tensor, ids: Tensor, slots: Tensor, records: Tensor, name: str, inter_dim: int) -> ExpertRecord:
    """ValueError unless the tensors fit together."""
    if name not in EXPERT_FORMATS or records.ndim != 2 or records.dtype != torch.uint8 or not records.is_contiguous():
        raise ValueError(f"no kernel runs {records.dtype} records of format {name!r}")
    record = expert_record(name, x.shape[1], inter_dim)
    alike = ids.ndim == x.ndim == 2 and len(ids) == len(x) and slots.ndim == 1
    if records.shape[1] != record.nbytes or not alike or {x.device, ids.device, slots.device} != {records.device}:
        raise ValueError(f"x {tuple(x.shape)}, ids {tuple(ids.shape)} and records {tuple(records.shape)} do not fit")
    return record


def _device_experts_cpu(
    x: Tensor, ids: Tensor, weights: Tensor, slots: Tensor, records: Tensor, name: str, inter_dim: int
) -> Tensor:
    """On an emulated device: the CPU's kernel, from the records that count as the device's."""
    record = _check(x, ids, slots, records, name, inter_dim)
    count, (tokens, top_k) = len(records), ids.shape
    bases = records.data_ptr() + torch.arange(count, dtype=torch.int64) * record.nbytes
    table = bases[:, None] + torch.tensor([record.w1, record.w3, record.w2])
    order, scratch = moe_scratch_sizes(tokens, top_k, count, record.dim, inter_dim)
    buffers = torch.empty(order, dtype=torch.int64), torch.empty(scratch), torch.empty(tokens, record.dim)
    torch.ops.dsr1.packed_moe_experts.default(
        x.float().contiguous(), slots[ids], weights.float(), table, inter_dim, name, 1, *buffers
    )
    return buffers[-1]


def _device_experts_cuda(
    x: Tensor, ids: Tensor, weights: Tensor, slots: Tensor, records: Tensor, name: str, inter_dim: int
) -> Tensor:
    """By the kernels of quant/gpu, some tokens at a time: each pair of token and expert takes a row of float32."""
    record = _check(x, ids, slots, records, name, inter_dim)
    out, values = x.new_empty(x.shape, dtype=torch.float32), x.to(torch.bfloat16)
    for first in range(0, len(x), TOKENS_ON_DEVICE):
        some = slice(first, first + TOKENS_ON_DEVICE)
        out[some] = gpu_ops.experts(values[some], ids[some], weights[some], slots, records, record)
    return out


def _device_experts_fake(
    x: Tensor, ids: Tensor, weights: Tensor, slots: Tensor, records: Tensor, name: str, inter_dim: int
) -> Tensor:
    """The memory that CUDA's takes: the result, and what some tokens take at a time."""
    _check(x, ids, slots, records, name, inter_dim)
    x.new_empty(device_experts_bytes(len(x), ids.shape[1], x.shape[1], inter_dim), dtype=torch.uint8)
    return x.new_empty(x.shape, dtype=torch.float32)


_library.impl("device_experts", _device_experts_cpu, "CPU")
_library.impl("device_experts", _device_experts_cuda, "CUDA")
torch.library.register_fake("dsr1::device_experts", _device_experts_fake, lib=_library)

"""Routed experts on the CPU, behind submit and sync.

The order of work for one layer; `main` is the model's stream, `experts` the stream that all layers' experts share:

    submit  main     record inputs        x, ids and weights have been computed, and the last sync has read `out`
            experts  wait   inputs
            experts  copy   x, ids and weights into the host buffers
            experts  launch the kernel, from those buffers to the host buffer `out`
            experts  record outputs
            experts  launch the kernel for deferred experts (offload/deferral.py), to one of the host's `late_slots`
    (the model goes on: shared experts run on main)
    sync    main     wait   outputs
            main     copy   `out` to the device
            main     copy   what the layer before deferred to the device, where it is added: it was computed before

The buffers are one set: a second submit before sync overwrites them, and sync then refuses the first. `Pending` keeps
the device tensors that the copies read alive; `ExpertBuffers.abandon` frees them when nobody will sync. Of
`late_slots` there are two, which layers take in turns: one is written while the other waits to be read, and it is
written again only behind a `wait inputs` that comes after that reading.

Where the device is the host itself, the kernel reads what it is given and its result is taken as it is: nothing is
copied, because at one token the copies alone cost a twentieth of the kernel's time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from offload.backend import Backend
from offload.deferral import NO_DEFERRAL, Deferral
from offload.node_experts import NodeExperts
from offload.plan import DECODED
from quant.config import ModelConfig
from quant.conversion import as_float32, converted
from quant.formats import QuantTensor
from quant.ops import check_weight, moe_scratch_sizes
from quant.packed import ExpertRecord
from quant.tape import empty

ExpertWeights = tuple[QuantTensor, QuantTensor, QuantTensor]  # w1 [inter, dim], w2 [dim, inter], w3 [inter, dim]
Inputs = tuple[Tensor, Tensor, Tensor]  # x float32 [T, dim], ids int64 [T, K], weights float32 [T, K]


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The experts of a layer as a store holds them. records: uint8 [E, record.nbytes]."""

    records: Tensor
    record: ExpertRecord


@dataclass(frozen=True, eq=False)
class Pending:
    """Submitted work. `inputs` are on the model's device. late: what the layer before deferred, which joins here.

    out: float32 [T, dim], where the device is the host.
    """

    inputs: Inputs
    dtype: torch.dtype
    late: Tensor | None = None
    out: Tensor | None = None


class ExpertBuffers:
    """Host memory, stream and events for the experts of all layers, made once for up to `max_tokens` tokens a call.

    Set the number of threads before: a later, larger number is not made use of.
    """

    def __init__(self, config: ModelConfig, backend: Backend, max_tokens: int) -> None:
        dim, top_k, inter_dim = config.dim, config.n_activated_experts, config.moe_inter_dim
        order, scratch = moe_scratch_sizes(max_tokens, top_k, config.n_routed_experts, dim, inter_dim)
        self.backend, self.max_tokens = backend, max_tokens
        self.x = backend.allocate((max_tokens, dim), torch.float32, pinned=True)
        self.ids = backend.allocate((max_tokens, top_k), torch.int64, pinned=True)
        self.weights = backend.allocate((max_tokens, top_k), torch.float32, pinned=True)
        self.out = backend.allocate((max_tokens, dim), torch.float32, pinned=True)
        self.order = backend.allocate((order,), torch.int64, pinned=True)
        self.scratch = backend.allocate((scratch,), torch.float32, pinned=True)
        self.stream, self.inputs_ready, self.outputs_ready = backend.stream("experts"), backend.event(), backend.event()
        self.late_slots = [backend.allocate((DECODED, dim), torch.float32, pinned=True) for _ in range(2)]
        self.pending: Pending | None = None
        self.late: Tensor | None = None  # what the latest submit deferred

    def free_late_slot(self) -> Tensor:
        """Memory for what a layer defers: not that which the layer before took."""
        self.late_slots.reverse()
        return self.late_slots[0]

    def abandon(self) -> None:
        """Let go of work that nobody will sync, after a forward pass was interrupted."""
        self.backend.synchronize()
        self.pending = self.late = None


class CpuExperts:
    """The routed experts of one layer; their weights stay where they are: in mapped files, or copied into nodes."""

    def __init__(
        self,
        weights: Sequence[ExpertWeights] | PackedExperts | NodeExperts,
        backend: Backend,
        buffers: ExpertBuffers,
        deferral: Deferral = NO_DEFERRAL,
    ) -> None:
        # kept because the table below holds only addresses
        self.weights = weights if isinstance(weights, PackedExperts | NodeExperts) else tuple(weights)
        self.backend, self.buffers, self.deferral = backend, buffers, deferral
        self.nodes = len(weights.parts) if isinstance(weights, NodeExperts) else 1
        dim = buffers.x.shape[1]
        self.stored: torch.dtype | str
        if isinstance(self.weights, PackedExperts):
            self.kernel = torch.ops.dsr1.packed_moe_experts.default
            self.inter_dim, self.stored = _check_records(self.weights, dim)
            self.table = _record_table(self.weights)
        elif isinstance(self.weights, NodeExperts):
            self.kernel = torch.ops.dsr1.packed_moe_experts.default
            self.inter_dim, self.stored = _check_nodes(self.weights, dim)
            self.table = self.weights.table()
        else:
            self.kernel = torch.ops.dsr1.moe_experts.default
            self.inter_dim, self.stored = _check_experts(self.weights, dim)
            self.table = _address_table(self.weights)

    def submit(self, x: Tensor, ids: Tensor, weights: Tensor) -> Pending:
        """Start the experts `ids` [T, K] on x [T, dim] with `weights` [T, K], all on the model's device.

        Raises ValueError for more tokens than the buffers hold. Work submitted earlier and not synced is lost.
        """
        backend, buffers, tokens = self.backend, self.buffers, x.shape[0]
        if tokens > buffers.max_tokens:
            raise ValueError(f"{tokens} tokens do not fit expert buffers for {buffers.max_tokens}; pass smaller chunks")
        late = buffers.late if self.deferral.joins else None
        if self.deferral.of(tokens):
            ids, weights = heaviest_first(ids, weights)
        if backend.is_host:
            inputs = (as_float32(x, buffers.x[:tokens]), ids.to(torch.int64).contiguous(), as_float32(weights))
            out = empty(*x.shape) if x.dtype == torch.float32 else buffers.out[:tokens]
            pending = Pending(inputs, x.dtype, late, out)  # the kernel reads its inputs as they are
            self._launch(inputs, out)
        else:
            pending = Pending((x.to(torch.float32), ids.to(torch.int64), weights.to(torch.float32)), x.dtype, late)
            self._launch(self._copied(pending.inputs), buffers.out[:tokens])
        buffers.pending = pending
        return pending

    def _copied(self, inputs: Inputs) -> Inputs:
        """The host's copies of inputs on the device, when the stream of experts comes to them."""
        backend, buffers, tokens = self.backend, self.buffers, inputs[0].shape[0]
        host = (buffers.x[:tokens], buffers.ids[:tokens], buffers.weights[:tokens])
        backend.record(buffers.inputs_ready, backend.main)
        backend.wait(buffers.inputs_ready, buffers.stream)
        for dst, src in zip(host, inputs, strict=True):
            backend.copy(dst, src, buffers.stream)
        return host

    def _launch(self, inputs: Inputs, out: Tensor) -> None:
        """Queue the experts that belong to this layer, and then those that join the next one."""
        buffers, backend, (x, ids, weights) = self.buffers, self.backend, inputs
        deferred = self.deferral.of(x.shape[0])
        now = ids.shape[1] - deferred
        self._run((x, ids[:, :now], weights[:, :now]), out)
        backend.record(buffers.outputs_ready, buffers.stream)
        buffers.late = buffers.free_late_slot() if deferred else None
        if buffers.late is not None:
            self._run((x, ids[:, now:], weights[:, now:]), buffers.late)

    def _run(self, inputs: Inputs, out: Tensor) -> None:
        buffers, stored = self.buffers, (self.table, self.inter_dim, self.stored, self.nodes)
        args = (*inputs, *stored, buffers.order, buffers.scratch, out)
        self.backend.launch(buffers.stream, self.kernel, *args)

    def sync(self, pending: Pending) -> Tensor:
        """The weighted sum over each token's experts: [T, dim] in the dtype and on the device of submit's x.

        Less what this layer defers, and with what the layer before has deferred.
        """
        backend, buffers = self.backend, self.buffers
        if pending is not buffers.pending:
            raise RuntimeError(
                "this is not the latest submitted work, or it was synced; sync each submit before the next"
            )
        buffers.pending = None
        if pending.out is not None:
            total = pending.out if pending.late is None else pending.out.add_(pending.late)
            return converted(total, pending.dtype)
        hosts = [buffers.out[: pending.inputs[0].shape[0]], *([] if pending.late is None else [pending.late])]
        fetched = [backend.allocate(tuple(host.shape), host.dtype) for host in hosts]
        backend.wait(buffers.outputs_ready, backend.main)
        for out, host in zip(fetched, hosts, strict=True):
            backend.copy(out, host, backend.main)
        total, *late = fetched
        for more in late:
            total.add_(more)
        return total.to(pending.dtype)


def heaviest_first(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Experts and their weights [T, K] in descending order of weights, equal ones in ascending order of ids."""
    by_id = ids.argsort(dim=-1)
    ids, weights = ids.gather(-1, by_id), weights.gather(-1, by_id)
    order = torch.argsort(weights, dim=-1, descending=True, stable=True)
    return ids.gather(-1, order), weights.gather(-1, order)


def _check_experts(experts: Sequence[ExpertWeights], dim: int) -> tuple[int, torch.dtype]:
    """(inter_dim, dtype) of a layer's experts, which must all be alike, as one kernel call runs them together."""
    if not experts:
        raise ValueError("a layer of experts needs at least one")
    inter_dim, dtype = experts[0][0].shape[0], experts[0][0].data.dtype
    shapes = ((inter_dim, dim), (dim, inter_dim), (inter_dim, dim))
    for number, expert in enumerate(experts):
        for weight, shape in zip(expert, shapes, strict=True):
            check_weight(weight.data, weight.scale)
            if tuple(weight.data.shape) != shape or weight.data.dtype != dtype or weight.data.device.type != "cpu":
                raise ValueError(
                    f"expert {number} has a matrix of {weight.data.dtype} {tuple(weight.data.shape)} on "
                    f"{weight.data.device}; this layer's kernel needs {dtype} {shape} in host memory"
                )
    return inter_dim, dtype


def _address_table(experts: Sequence[ExpertWeights]) -> Tensor:
    """int64 [E, 6]: where the data of w1, w3, w2 and their scales lie (0 for no scales). Fake weights lie nowhere."""
    if is_fake(experts[0][0].data):
        return torch.zeros(len(experts), 6, dtype=torch.int64)
    rows = []
    for w1, w2, w3 in experts:
        scales = [0 if w.scale is None else w.scale.data_ptr() for w in (w1, w3, w2)]
        rows.append([w.data.data_ptr() for w in (w1, w3, w2)] + scales)
    return torch.tensor(rows, dtype=torch.int64)


def _check_records(experts: PackedExperts, dim: int) -> tuple[int, str]:
    """(inter_dim, name of the format) of a layer's records."""
    records, record = experts.records, experts.record
    if records.dtype != torch.uint8 or records.device.type != "cpu" or not records.is_contiguous():
        raise ValueError(
            f"records of experts must be contiguous uint8 in host memory, not {records.dtype} on "
            f"{records.device} with strides {records.stride()}"
        )
    if records.ndim != 2 or records.shape[0] < 1 or records.shape[1] != record.nbytes or record.dim != dim:
        raise ValueError(
            f"records of shape {tuple(records.shape)} with {record.dim} columns are not those of a layer of experts "
            f"with {dim} columns, which take {record.nbytes} bytes each"
        )
    return record.inter_dim, record.format_name


def _check_nodes(experts: NodeExperts, dim: int) -> tuple[int, str]:
    """(inter_dim, name of the format) of a layer's experts in the memory of nodes."""
    if experts.record.dim != dim:
        raise ValueError(f"experts with {experts.record.dim} columns are not those of a layer with {dim}")
    return experts.record.inter_dim, experts.record.format_name


def _record_table(experts: PackedExperts) -> Tensor:
    """int64 [E, 3]: where w1, w3 and w2 of each record lie. Fake records lie nowhere."""
    count, record = len(experts.records), experts.record
    if is_fake(experts.records):
        return torch.zeros(count, 3, dtype=torch.int64)
    bases = experts.records.data_ptr() + torch.arange(count, dtype=torch.int64) * record.nbytes
    return bases[:, None] + torch.tensor([record.w1, record.w3, record.w2])

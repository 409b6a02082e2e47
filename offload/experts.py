"""Routed experts on the CPU, behind submit and sync.

The order of work for one layer; `main` is the model's stream, `experts` the stream that all layers' experts share:

    submit  main     record inputs        x, ids and weights have been computed, and the last sync has read `out`
            experts  wait   inputs
            experts  copy   x, ids and weights into the host buffers
            experts  launch the kernel, from those buffers to the host buffer `out`
            experts  record outputs
    (the model goes on: shared experts run on main)
    sync    main     wait   outputs
            main     copy   `out` to the device

The buffers are one set: a second submit before sync overwrites them, and sync then refuses the first. `Pending` keeps
the device tensors that the copies read alive; `ExpertBuffers.abandon` frees them when nobody will sync.

Where the device is the host itself, the kernel reads what it is given and its result is taken as it is: nothing is
copied, because at one token the copies alone cost a twentieth of the kernel's time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from offload.backend import Backend
from offload.node_experts import NodeExperts
from quant.config import ModelConfig
from quant.conversion import as_float32, converted
from quant.formats import QuantTensor
from quant.ops import check_weight, moe_scratch_sizes
from quant.packed import ExpertRecord
from quant.tape import empty

ExpertWeights = tuple[QuantTensor, QuantTensor, QuantTensor]  # w1 [inter, dim], w2 [dim, inter], w3 [inter, dim]


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The experts of a layer as a store holds them. records: uint8 [E, record.nbytes]."""

    records: Tensor
    record: ExpertRecord


@dataclass(frozen=True, eq=False)
class Pending:
    """Submitted work. `inputs`: x float32 [T, dim], ids int64 [T, K], weights float32 [T, K] on the model's device.

    out: float32 [T, dim], where the device is the host.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    dtype: torch.dtype
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
        self.pending: Pending | None = None

    def abandon(self) -> None:
        """Let go of work that nobody will sync, after a forward pass was interrupted."""
        self.backend.synchronize()
        self.pending = None


class CpuExperts:
    """The routed experts of one layer; their weights stay where they are: in mapped files, or copied into nodes."""

    def __init__(
        self, weights: Sequence[ExpertWeights] | PackedExperts | NodeExperts, backend: Backend, buffers: ExpertBuffers
    ) -> None:
        # kept because the table below holds only addresses
        self.weights = weights if isinstance(weights, PackedExperts | NodeExperts) else tuple(weights)
        self.backend, self.buffers = backend, buffers
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
        if backend.is_host:
            inputs = (as_float32(x, buffers.x[:tokens]), ids.to(torch.int64), as_float32(weights))
            return self._submit_on_host(inputs, x.dtype)
        inputs = (x.to(torch.float32), ids.to(torch.int64), weights.to(torch.float32))
        pending = Pending(inputs, x.dtype)
        host = (buffers.x[:tokens], buffers.ids[:tokens], buffers.weights[:tokens])

        backend.record(buffers.inputs_ready, backend.main)
        backend.wait(buffers.inputs_ready, buffers.stream)
        for dst, src in zip(host, pending.inputs, strict=True):
            backend.copy(dst, src, buffers.stream)
        self._launch(host, buffers.out[:tokens])
        backend.record(buffers.outputs_ready, buffers.stream)
        buffers.pending = pending
        return pending

    def _submit_on_host(self, inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Pending:
        """The kernel reads its inputs as they are; its result is in the buffer only if `sync` converts it."""
        x, ids, weights = inputs
        out = empty(*x.shape) if dtype == torch.float32 else self.buffers.out[: x.shape[0]]
        self._launch((x, ids.contiguous(), weights), out)
        self.buffers.pending = pending = Pending(inputs, dtype, out)
        return pending

    def _launch(self, inputs: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
        buffers, stored = self.buffers, (self.table, self.inter_dim, self.stored, self.nodes)
        args = (*inputs, *stored, buffers.order, buffers.scratch, out)
        self.backend.launch(buffers.stream, self.kernel, *args)

    def sync(self, pending: Pending) -> Tensor:
        """The weighted sum over each token's experts: [T, dim] in the dtype and on the device of submit's x."""
        backend, buffers = self.backend, self.buffers
        if pending is not buffers.pending:
            raise RuntimeError(
                "this is not the latest submitted work, or it was synced; sync each submit before the next"
            )
        if pending.out is not None:
            buffers.pending = None
            return converted(pending.out, pending.dtype)
        host = buffers.out[: pending.inputs[0].shape[0]]
        out = backend.allocate(tuple(host.shape), host.dtype)
        backend.wait(buffers.outputs_ready, backend.main)
        backend.copy(out, host, backend.main)
        buffers.pending = None
        return out.to(pending.dtype)


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

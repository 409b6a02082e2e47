"""From an opened model folder to a model that runs: each part of the model asks for its weights by name.

What a part gets follows from the plan: in which format, and whether on the model's device or in mapped files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from hybrid_rt.layers import Linear
from hybrid_rt.transformer import Transformer
from offload.backend import Backend
from offload.deferral import deferral_of
from offload.device_experts import ELSEWHERE, DeviceExperts, SplitExperts
from offload.experts import CpuExperts, ExpertBuffers, ExpertWeights, PackedExperts
from offload.memory import lock
from offload.node_experts import NodeExperts, copy_records
from offload.plan import Placement, Plan, is_streamable, planned_component
from offload.streamed_experts import HostExperts, Staging, StreamedExperts
from offload.topology import Topology, read_topology
from quant.checkpoint import Checkpoint
from quant.dequantize import dequantize
from quant.formats import QuantTensor
from quant.packed import PackedFormat, blocks_per_row
from quant.progress import Meter, Progress, ignore
from quant.store import Store, is_store

Source = Checkpoint | Store


def open_model(folder: Path) -> Source:
    """The checkpoint or store in `folder`. Raises Dsr1Error when it is neither, or damaged."""
    return Store.open(folder) if is_store(folder) else Checkpoint.open(folder)


@dataclass(frozen=True)
class Loading:
    """The machine to load a model into, and who is told. notes: of what the user should know; they grow.

    progress: is told of experts that are locked or copied.
    """

    topology: Topology = field(default_factory=read_topology)
    notes: list[str] = field(default_factory=list)
    progress: Callable[[Progress], None] = ignore


class StoredParts:
    """Weights of a checkpoint or a store, where the plan wants them (`Parts`).

    Matrices stay views of the mapped files unless they belong on the device, and so do experts that are not copied.
    Norms and routers are float32; so is `wkv_b` where there is no GPU tier and it is not packed as attention reads it.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        dtype: torch.dtype,
        backend: Backend,
        buffers: ExpertBuffers,
        loading: Loading | None = None,
    ) -> None:
        self.source, self.plan, self.dtype, self.backend, self.buffers = source, plan, dtype, backend, buffers
        self.loading = loading or Loading()
        brought = [p.nbytes for p in plan.placements if p.experts is not None and p.residency in ("locked", "copied")]
        self.meter = Meter(sum(brought), self.loading.progress)

    def linear(self, name: str) -> Linear:
        return Linear(self._matrix(name))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = self.source.weight(name).dequantize(dtype or self.dtype)
        return self._put(values, self._placement(name))

    def whole(self, name: str) -> Callable[[], torch.Tensor | QuantTensor]:
        if self._placement(name).tier == "gpu":
            weight = self._matrix(name)
            on_cuda = self.backend.device.type == "cuda"
            return lambda: weight if on_cuda else dequantize(weight)
        if self._placement(name).representation == "f32":
            values = dequantize(self.source.weight(name))
            return lambda: values
        weight = self._matrix(name)
        assert isinstance(weight.format, PackedFormat), "the plan takes wkv_b as it is stored only if it is packed"
        stored = weight.data.view(-1, blocks_per_row(weight.shape), weight.format.block_bytes)
        return lambda: stored

    def embedding(self, name: str) -> torch.Tensor:
        return self.source.weight(name).data

    def experts(self, layer: int) -> CpuExperts | HostExperts | SplitExperts:
        placements = self.plan.expert_placements(layer)
        on_device = [placement for placement in placements if placement.tier == "gpu"]
        on_host = [placement for placement in placements if placement.tier != "gpu"]
        host = self._in_ram(layer, on_host) if on_host else None
        if host is not None and not on_device:
            return host
        return SplitExperts(self._device_experts(layer, on_device), host)

    def _in_ram(self, layer: int, placements: Sequence[Placement]) -> CpuExperts | HostExperts:
        weights, streaming = self._host_experts(layer, placements), self.plan.streaming
        cpu = CpuExperts(weights, self.backend, self.buffers, deferral_of(self.plan, layer))
        streamable = all(is_streamable(placement, self.plan.n_layers) for placement in placements)
        if streaming is None or not streamable or not isinstance(weights, PackedExperts | NodeExperts):
            return cpu
        ranges = [placement.experts for placement in placements if placement.experts is not None]
        return HostExperts(cpu, StreamedExperts(weights, ranges, self._staging), streaming.from_tokens)

    @cached_property
    def _staging(self) -> Staging:
        """Buffers that all layers' experts are streamed through."""
        streaming = self.plan.streaming
        assert streaming is not None, "a plan that streams says how"
        experts = self.source.config.n_routed_experts
        return Staging(self.backend, streaming.record_bytes, experts, streaming.slice_experts)

    def _device_experts(self, layer: int, placements: Sequence[Placement]) -> DeviceExperts:
        """Those on the device, which only a store's can be. They are copied there."""
        assert isinstance(self.source, Store), "the plan puts only a store's experts on a GPU"
        records, slots = self.source.expert_records(layer), [ELSEWHERE] * self.source.config.n_routed_experts
        chosen = [expert for placement in placements if placement.experts for expert in range(*placement.experts)]
        for slot, expert in enumerate(chosen):
            slots[expert] = slot
        pieces = [records[slice(*placement.experts)] for placement in placements if placement.experts]
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        placed = self.backend.place("routed_expert", whole)
        return DeviceExperts(placed, self.backend.place("expert slots", torch.tensor(slots)), self.source.record(layer))

    def _host_experts(
        self, layer: int, placements: Sequence[Placement]
    ) -> list[ExpertWeights] | PackedExperts | NodeExperts:
        """The routed experts of a layer, resident as the plan says. Other than mapped are only those of a store."""
        kept = [placement for placement in placements if placement.residency != "mapped"]
        if not kept or not isinstance(self.source, Store):
            return layer_experts(self.source, layer)
        span, record = self.source.expert_span(layer), self.source.record(layer)
        report = self.meter.of(span.path.name)
        if kept[0].residency == "copied":
            copied = copy_records(span, record, self.loading.topology, self.loading.notes)
            report(span.nbytes)
            return copied
        experts = PackedExperts(self.source.expert_records(layer), record)
        for placement in kept:
            if placement.experts is not None:
                lock(experts.records[slice(*placement.experts)])
                report(placement.nbytes)
        return experts

    def _matrix(self, name: str) -> QuantTensor:
        """A matrix in the plan's representation, on the device if the plan has it there."""
        placement = self._placement(name)
        planned = placement.representation.split("+")
        chosen = next(choice for choice in self.source.representations(name) if choice in planned)
        weight = self.source.weight(name, chosen)
        scale = None if weight.scale is None else self._put(weight.scale, placement)
        return QuantTensor(weight.format, weight.shape, self._put(weight.data, placement), scale)

    def _put(self, tensor: torch.Tensor, placement: Placement) -> torch.Tensor:
        return self.backend.place(placement.component, tensor) if placement.tier == "gpu" else tensor

    def _placement(self, name: str) -> Placement:
        spec = self.source.inventory.by_name[name]
        return self.plan.placement(spec.layer, planned_component(spec))


def layer_experts(source: Source, layer: int) -> list[ExpertWeights] | PackedExperts:
    """The routed experts of a layer, as views of the mapped files."""
    if isinstance(source, Store):
        return PackedExperts(source.expert_records(layer), source.record(layer))
    return [_expert(source, f"layers.{layer}.ffn.experts.{expert}") for expert in range(source.config.n_routed_experts)]


def _expert(source: Checkpoint, prefix: str) -> ExpertWeights:
    return source.weight(f"{prefix}.w1"), source.weight(f"{prefix}.w2"), source.weight(f"{prefix}.w3")


def load_transformer(
    source: Source,
    plan: Plan,
    dtype: torch.dtype,
    backend: Backend,
    buffers: ExpertBuffers,
    loading: Loading | None = None,
) -> Transformer:
    """The model of `source`, for forward passes of as many tokens as `buffers` hold. loading: by default in silence."""
    parts = StoredParts(source, plan, dtype, backend, buffers, loading)
    model = Transformer(source.config, parts, dtype, len(source.mtp_layers)).eval()
    model.rope.to(backend.device)
    return model

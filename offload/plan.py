"""The plan: where every part of a model lives, in which format, and what that takes of the GPU and of RAM.

Plain data that can be printed, saved and compared. offload/planner.py makes it, the loader follows it.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from quant.errors import Dsr1Error
from quant.inventory import Component, TensorSpec

PLAN_VERSION = 1

Device = Literal["cuda", "cpu", "emulate"]
Tier = Literal["gpu", "ram"]
# mapped: pages of the file, which Linux may drop. locked: mapped and kept in RAM. copied: anonymous memory.
RamResidency = Literal["mapped", "locked", "copied"]
RAM_RESIDENCIES: tuple[RamResidency, ...] = get_args(RamResidency)
Residency = RamResidency | Literal["gpu", "disk"]  # disk: read when needed
# `wkv_b` stands alone: attention reads it in two forms, so it lives in another form than its neighbours.
PlanComponent = Component | Literal["kv_b"]

PART_NAMES: dict[PlanComponent, str] = {
    "embed": "embedding",
    "dense": "dense layers",
    "router": "routers",
    "routed_expert": "routed experts",
    "shared_expert": "shared experts",
    "norm": "norms",
}


class PlanError(Dsr1Error):
    """A model does not fit the memory it may use."""


def planned_component(spec: TensorSpec) -> PlanComponent:
    """The component under which a plan places a tensor."""
    return "kv_b" if spec.name.endswith(".wkv_b") else spec.component


@dataclass(frozen=True)
class Placement:
    """One component of one layer.

    layer: None outside of the layers. experts: the range (first, end) of routed experts, None for the rest.
    representation: a format's name; "a+b" where the component's tensors differ. nbytes: scales and padding included.
    """

    layer: int | None
    component: PlanComponent
    experts: tuple[int, int] | None
    tier: Tier
    representation: str
    residency: Residency
    nbytes: int


@dataclass(frozen=True)
class Row:
    """One line of a plan's table. layers: as "3-60"; empty outside of the layers."""

    part: str
    layers: str
    representation: str
    tier: Tier
    residency: Residency
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Where a model lives on one machine. All sizes are bytes.

    n_layers: MTP layers are numbered from there. context: tokens that the latent cache holds. prefill_chunk: most
    tokens of a forward pass. cache_bytes: of the latent cache in cache_dtype. workspace_bytes: temporaries of a forward
    pass. These two are on the GPU, or in RAM where there is none. reserve_bytes: what CUDA itself takes. host_bytes:
    buffers through which experts get their inputs. decode_ram_bytes: weights read from RAM for a token. nodes: NUMA
    nodes that copied experts are split over.
    """

    device: Device
    gpu_budget: int
    ram_budget: int
    n_layers: int
    context: int
    prefill_chunk: int
    cache_dtype: str
    cache_bytes: int
    workspace_bytes: int
    reserve_bytes: int
    host_bytes: int
    decode_ram_bytes: int
    placements: tuple[Placement, ...]
    notes: tuple[str, ...] = ()
    nodes: int = 1
    version: int = PLAN_VERSION

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU tier, a real one or an emulated one."""
        return self.device != "cpu"

    @property
    def gpu_bytes(self) -> int:
        """All that the plan takes of the GPU."""
        working = self.cache_bytes + self.workspace_bytes + self.reserve_bytes if self.on_gpu else 0
        return self.weight_bytes("gpu") + working

    @property
    def ram_bytes(self) -> int:
        """All that the plan takes of RAM, mapped files included."""
        working = 0 if self.on_gpu else self.cache_bytes + self.workspace_bytes
        return self.weight_bytes("ram") + self.host_bytes + working

    def weight_bytes(self, tier: Tier) -> int:
        """Bytes of the weights in `tier`."""
        return sum(placement.nbytes for placement in self.placements if placement.tier == tier)

    def resident_bytes(self, residency: Residency) -> int:
        """Bytes of the weights that live in one way."""
        return sum(placement.nbytes for placement in self.placements if placement.residency == residency)

    @cached_property
    def _by_key(self) -> dict[tuple[int | None, PlanComponent], Placement]:
        return {(placement.layer, placement.component): placement for placement in self.placements}

    def placement(self, layer: int | None, component: PlanComponent) -> Placement:
        """Where a component of a layer lives. Raises KeyError if the model has none."""
        return self._by_key[layer, component]

    def representation(self, layer: int | None, component: PlanComponent) -> str:
        """The format in which a component of a layer is used. Raises KeyError if the model has none."""
        return self.placement(layer, component).representation

    def table(self) -> list[Row]:
        """What people read: one row for placements of a kind, and the buffers; the GPU first."""
        kinds: dict[tuple[str, Tier, Residency], list[Placement]] = {}
        for placement in self.placements:
            is_mtp = placement.layer is not None and placement.layer >= self.n_layers
            part = "MTP layers" if is_mtp else PART_NAMES.get(placement.component, placement.component)
            kinds.setdefault((part, placement.tier, placement.residency), []).append(placement)
        rows = [_row(*kind, placements) for kind, placements in kinds.items()]
        return sorted([*rows, *self._buffers()], key=lambda row: row.tier)

    def _buffers(self) -> Iterable[Row]:
        tier: Tier = "gpu" if self.on_gpu else "ram"
        residency: Residency = "gpu" if self.on_gpu else "copied"
        yield Row(f"cache of {self.context} tokens", "", self.cache_dtype, tier, residency, self.cache_bytes)
        yield Row(f"workspace for {self.prefill_chunk} tokens", "", "", tier, residency, self.workspace_bytes)
        if self.reserve_bytes:
            yield Row("CUDA itself", "", "", "gpu", "gpu", self.reserve_bytes)
        yield Row("buffers of the experts", "", "f32", "ram", "copied", self.host_bytes)

    def to_json(self) -> dict[str, Any]:
        """The plan and its sums as a JSON object, in a fixed order."""
        mapped = self.resident_bytes("mapped")
        sums = {"gpu_bytes": self.gpu_bytes, "ram_bytes": self.ram_bytes, "ram_mapped_bytes": mapped}
        fields = asdict(self)
        return {"version": fields.pop("version"), **sums, **fields}


def _row(part: str, tier: Tier, residency: Residency, placements: list[Placement]) -> Row:
    layers = [placement.layer for placement in placements if placement.layer is not None]
    formats = dict.fromkeys(name for placement in placements for name in placement.representation.split("+"))
    return Row(part, _ranges(layers), ", ".join(formats), tier, residency, sum(p.nbytes for p in placements))


def _ranges(layers: list[int]) -> str:
    """Layers in a few characters: "0-60", "3". Placements of a kind are neighbours in every known model."""
    if not layers:
        return ""
    first, last = min(layers), max(layers)
    return str(first) if first == last else f"{first}-{last}"

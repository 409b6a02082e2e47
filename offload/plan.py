"""The plan: where every part of a model lives, in which format, and what that takes of the GPU and of RAM.

Plain data, keyed by (layer, component, range of experts), that can be printed, saved and compared. offload/planner.py
makes it, offload/plan_file.py saves and reads it, the loader follows it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from quant.errors import Dsr1Error
from quant.inventory import CacheFormat, Component, TensorSpec
from quant.packed import EXPERT_FORMATS

PLAN_VERSION = 3
DECODED = 1  # tokens of a pass that may defer experts
SLICE_EXPERTS = 8  # that are streamed at a time; R1's take 189 MiB
STAGING_SLOTS = 2  # slices that are on their way at a time

Device = Literal["cuda", "cpu", "emulate"]
Tier = Literal["gpu", "ram", "disk"]  # disk: read when needed, which this version refuses
TIERS: tuple[Tier, ...] = get_args(Tier)
# mapped: pages of the file, which Linux may drop. locked: mapped and kept in RAM. copied: anonymous memory.
RamResidency = Literal["mapped", "locked", "copied"]
RAM_RESIDENCIES: tuple[RamResidency, ...] = get_args(RamResidency)
Residency = RamResidency | Literal["gpu", "disk"]
# `wkv_b` stands alone: attention reads it in two forms, so it lives in another form than its neighbours.
PlanComponent = Component | Literal["kv_b"]
Range = tuple[int, int]  # of experts: the first, and the one after the last

PART_NAMES: dict[PlanComponent, str] = {
    "embed": "embedding",
    "dense": "dense layers",
    "router": "routers",
    "routed_expert": "routed experts",
    "shared_expert": "shared experts",
    "norm": "norms",
}


class PlanError(Dsr1Error):
    """A model does not fit the memory it may use, or a plan does not fit the model."""


def is_streamable(placement: "Placement", n_layers: int) -> bool:
    """Whether these are routed experts in RAM that may be sent to a GPU: packed ones, and not those of MTP layers."""
    is_mtp = placement.layer is not None and placement.layer >= n_layers
    in_ram = placement.component == "routed_expert" and placement.tier == "ram"
    return in_ram and not is_mtp and placement.representation in EXPERT_FORMATS


def planned_component(spec: TensorSpec) -> PlanComponent:
    """The component under which a plan places a tensor."""
    return "kv_b" if spec.name.endswith(".wkv_b") else spec.component


@dataclass(frozen=True)
class Placement:
    """One component of one layer, or some of its routed experts.

    layer: None outside of the layers. experts: the range (first, end) of routed experts, None for the rest.
    representation: a format's name; "a+b" where the component's tensors differ. nbytes: scales and padding included.
    """

    layer: int | None
    component: PlanComponent
    experts: Range | None
    tier: Tier
    representation: str
    residency: Residency
    nbytes: int

    @property
    def expert_count(self) -> int:
        """Routed experts of the range; 0 for anything else."""
        return 0 if self.experts is None else self.experts[1] - self.experts[0]


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
class Transfers:
    """Bytes that cross between host and GPU in a forward pass: what goes there and back for each of its tokens.

    embedded: to the GPU, embedded tokens. down: to the host, experts' inputs. up: to the GPU, their outputs. logits: to
    the host, once a pass. late: to the GPU, outputs of deferred experts, in decoding.
    """

    embedded: int
    down: int
    up: int
    logits: int
    late: int = 0

    @property
    def decode(self) -> int:
        """Bytes of one generated token."""
        return self.of_pass(DECODED)

    def of_pass(self, tokens: int) -> int:
        """Bytes of a pass of so many tokens that streams no experts, with one token's logits."""
        late = self.late if tokens <= DECODED else 0
        return tokens * (self.embedded + self.down + self.up) + late + self.logits


@dataclass(frozen=True)
class Streaming:
    """Long passes send routed experts from RAM to the GPU, a slice at a time, instead of computing them on the CPU.

    from_tokens: of the shortest such pass. slice_experts: how many a slice has. staging_bytes: of the buffers, on the
    GPU and as much again in pinned RAM. bytes_a_pass: of the weights that cross.
    """

    from_tokens: int
    slice_experts: int
    staging_bytes: int = 0
    bytes_a_pass: int = 0

    @property
    def record_bytes(self) -> int:
        """Of the largest expert that the buffers hold."""
        return self.staging_bytes // (STAGING_SLOTS * self.slice_experts)


@dataclass(frozen=True)
class Plan:
    """Where a model lives on one machine. All sizes are bytes.

    model: a fingerprint of its shape. n_layers: MTP layers are numbered from there. context: tokens that the latent
    cache holds. prefill_chunk: most tokens of a forward pass. dtype: of activations. cache_bytes: of the latent cache
    in cache_format. workspace_bytes: temporaries of a forward pass. These two are on the GPU, or in RAM where there is
    none. context_bytes: what CUDA itself takes. allocator_bytes: for what its allocator rounds up and leaves between
    blocks. host_bytes: buffers through which experts get their inputs. decode_ram_bytes: weights read from RAM for a
    token. transfers: between host and GPU; None without one. nodes: NUMA nodes that copied experts are split over.
    deferred_experts: of a token, that join one layer later in decoding (offload/deferral.py). streaming: of experts'
    weights in long passes (offload/streamed_experts.py); None for never.
    reasons: why it is this plan, a sentence for each choice.
    """

    model: str
    device: Device
    gpu_budget: int
    ram_budget: int
    n_layers: int
    context: int
    prefill_chunk: int
    dtype: str
    cache_format: CacheFormat
    cache_bytes: int
    workspace_bytes: int
    context_bytes: int
    allocator_bytes: int
    host_bytes: int
    decode_ram_bytes: int
    transfers: Transfers | None
    placements: tuple[Placement, ...]
    notes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    nodes: int = 1
    deferred_experts: int = 0
    streaming: Streaming | None = None
    version: int = PLAN_VERSION

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU tier, a real one or an emulated one."""
        return self.device != "cpu"

    @property
    def reserve_bytes(self) -> int:
        """What the model may not use of the GPU's budget."""
        return self.context_bytes + self.allocator_bytes

    @property
    def gpu_bytes(self) -> int:
        """All that the plan takes of the GPU."""
        working = self.cache_bytes + self.workspace_bytes + self.reserve_bytes if self.on_gpu else 0
        return self.weight_bytes("gpu") + working + self.staging_bytes

    @property
    def ram_bytes(self) -> int:
        """All that the plan takes of RAM, mapped files included."""
        working = 0 if self.on_gpu else self.cache_bytes + self.workspace_bytes
        return self.weight_bytes("ram") + self.host_bytes + working + self.staging_bytes

    @property
    def staging_bytes(self) -> int:
        """Of the buffers that experts are streamed through, on the GPU; those in RAM take as much."""
        return 0 if self.streaming is None else self.streaming.staging_bytes

    def streams(self, tokens: int) -> bool:
        """Whether a pass of so many tokens streams the experts that are in RAM."""
        return self.streaming is not None and tokens >= self.streaming.from_tokens

    @property
    def host_tokens(self) -> int:
        """Most tokens of a pass whose experts are computed by the CPU."""
        return self.prefill_chunk if self.streaming is None else min(self.prefill_chunk, self.streaming.from_tokens)

    def crossing_bytes(self, tokens: int) -> int:
        """Bytes between host and GPU in a pass of so many tokens, with one token's logits."""
        if self.transfers is None:
            return 0
        moved = self.transfers
        if self.streaming is not None and self.streams(tokens):
            return tokens * moved.embedded + self.streaming.bytes_a_pass + moved.logits
        return moved.of_pass(tokens)

    def weight_bytes(self, tier: Tier) -> int:
        """Bytes of the weights in `tier`."""
        return sum(placement.nbytes for placement in self.placements if placement.tier == tier)

    def resident_bytes(self, residency: Residency) -> int:
        """Bytes of the weights that live in one way."""
        return sum(placement.nbytes for placement in self.placements if placement.residency == residency)

    @cached_property
    def _by_key(self) -> dict[tuple[int | None, PlanComponent], list[Placement]]:
        groups: dict[tuple[int | None, PlanComponent], list[Placement]] = {}
        for placement in self.placements:
            groups.setdefault((placement.layer, placement.component), []).append(placement)
        return groups

    def placement(self, layer: int | None, component: PlanComponent) -> Placement:
        """Where a component of a layer lives that lives in one place. Raises KeyError if the model has none."""
        [placement] = self._by_key[layer, component]
        return placement

    def expert_placements(self, layer: int) -> Sequence[Placement]:
        """Where the routed experts of a layer live, in the order of their numbers."""
        return self._by_key[layer, "routed_expert"]

    def representation(self, layer: int | None, component: PlanComponent) -> str:
        """The format in which a component of a layer is used. Raises KeyError if the model has none."""
        return self._by_key[layer, component][0].representation

    @cached_property
    def layers_with_host_experts(self) -> frozenset[int]:
        """Layers, MTP layers left out, some or all of whose routed experts are not on a GPU."""
        found = (p.layer for p in self.placements if p.component == "routed_expert" and p.tier != "gpu")
        return frozenset(layer for layer in found if layer is not None and layer < self.n_layers)

    def gpu_experts(self) -> int:
        """Routed experts on the GPU, in all layers together."""
        return sum(placement.expert_count for placement in self.placements if placement.tier == "gpu")

    def table(self) -> list[Row]:
        """What people read: one row for placements of a kind, and the buffers; the GPU first."""
        kinds: dict[tuple[str, Tier, Residency], list[Placement]] = {}
        for placement in self.placements:
            is_mtp = placement.layer is not None and placement.layer >= self.n_layers
            part = "MTP layers" if is_mtp else PART_NAMES.get(placement.component, placement.component)
            kinds.setdefault((part, placement.tier, placement.residency), []).append(placement)
        rows = [_row(*kind, placements) for kind, placements in kinds.items()]
        return sorted([*rows, *self._buffers()], key=lambda row: TIERS.index(row.tier))

    def _buffers(self) -> Iterable[Row]:
        tier: Tier = "gpu" if self.on_gpu else "ram"
        residency: Residency = "gpu" if self.on_gpu else "copied"
        yield Row(f"cache of {self.context} tokens", "", self.cache_format, tier, residency, self.cache_bytes)
        yield Row(f"workspace for {self.prefill_chunk} tokens", "", "", tier, residency, self.workspace_bytes)
        if self.on_gpu:
            yield Row("CUDA itself", "", "", "gpu", "gpu", self.context_bytes)
            yield Row("its allocator's reserve", "", "", "gpu", "gpu", self.allocator_bytes)
        yield Row("buffers of the experts", "", "f32", "ram", "copied", self.host_bytes)
        if self.streaming is not None:
            staging = f"staging of {self.streaming.slice_experts} experts, twice"
            yield Row(staging, "", "", "gpu", "gpu", self.staging_bytes)
            yield Row(staging, "", "", "ram", "copied", self.staging_bytes)

    def to_json(self) -> dict[str, Any]:
        """The plan and its sums as a JSON object, in a fixed order."""
        mapped = self.resident_bytes("mapped")
        sums = {"gpu_bytes": self.gpu_bytes, "ram_bytes": self.ram_bytes, "ram_mapped_bytes": mapped}
        fields = asdict(self)
        return {"version": fields.pop("version"), **sums, **fields}


def _row(part: str, tier: Tier, residency: Residency, placements: list[Placement]) -> Row:
    layers = [placement.layer for placement in placements if placement.layer is not None]
    formats = dict.fromkeys(name for placement in placements for name in placement.representation.split("+"))
    if tier == "gpu" and (experts := sum(placement.expert_count for placement in placements)):
        part = f"{experts:,} {part}"
    return Row(part, _ranges(layers), ", ".join(formats), tier, residency, sum(p.nbytes for p in placements))


def _ranges(layers: list[int]) -> str:
    """Layers in a few characters: "0-60", "3". Placements of a kind are neighbours in every known model."""
    if not layers:
        return ""
    first, last = min(layers), max(layers)
    return str(first) if first == last else f"{first}-{last}"

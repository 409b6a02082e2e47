"""The parts of a model that a plan places: components of layers, with the representations that each may have."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from offload.pins import Pin
from offload.plan import Device, Placement, PlanComponent, RamResidency, Range, Residency, Tier, planned_component
from quant.config import ModelConfig
from quant.inventory import Inventory, TensorSpec
from quant.packed import EXPERT_FORMATS, ExpertRecord, reads_heads
from quant.store_formats import stored_bytes

GPU_COMPONENTS = frozenset({"attention", "kv_b", "dense", "shared_expert", "norm", "router", "head"})
# The runtime holds these in float32 whatever a checkpoint does, and so `kv_b` in RAM unless it is packed as attention
# reads it.
FLOAT32_COMPONENTS = ("norm", "router")

# Representations that may be chosen for a tensor, the most exact one first.
Available = Callable[[TensorSpec], Sequence[str]]


@dataclass(frozen=True)
class Budget:
    """What a plan may take and must hold. gpu_mem, ram: bytes. context: tokens. dtype: of activations and cache.

    residency: of routed experts. nodes: NUMA nodes to split them over if they are copied. deferred_experts: of a token,
    in decoding.
    """

    device: Device
    gpu_mem: int
    ram: int
    context: int
    dtype: str = "bfloat16"
    residency: RamResidency = "mapped"
    nodes: int = 1
    deferred_experts: int = 0


@dataclass(frozen=True)
class Form:
    """A component in one representation, with its bytes."""

    representation: str
    nbytes: int


@dataclass(frozen=True)
class Part:
    """One component of one layer, before its representation is chosen. forms: the most exact one first.

    pinned: whether its place is the user's choice.
    """

    layer: int | None
    component: PlanComponent
    experts: Range | None
    tier: Tier
    residency: Residency
    forms: tuple[Form, ...]
    pinned: bool = False
    is_mtp: bool = False

    @property
    def movable(self) -> bool:
        """Whether these are routed experts in RAM that the planner may put on a GPU: packed ones only."""
        is_experts = self.experts is not None and self.tier == "ram" and not self.is_mtp and not self.pinned
        return is_experts and self.forms[0].representation in EXPERT_FORMATS

    def placed(self, reduced: Sequence[PlanComponent] = ()) -> Placement:
        """With its smallest form if its component is among the `reduced` ones."""
        form = self.forms[-1 if self.component in reduced else 0]
        key = (self.layer, self.component, self.experts)
        return Placement(*key, self.tier, form.representation, self.residency, form.nbytes)

    def only(self, experts: Range) -> "Part":
        """Some of its experts."""
        assert self.experts is not None
        count, all_of_them = experts[1] - experts[0], self.experts[1] - self.experts[0]
        forms = tuple(Form(form.representation, form.nbytes // all_of_them * count) for form in self.forms)
        return replace(self, experts=experts, forms=forms)


class Parts:
    """The parts of one model for one budget, the user's pins among them, in the order in which a token meets them."""

    def __init__(self, inventory: Inventory, available: Available, budget: Budget, pins: Sequence[Pin] = ()) -> None:
        self.inventory, self.config, self.available = inventory, inventory.config, available
        self.budget, self.pins = budget, tuple(pins)

    @cached_property
    def all(self) -> tuple[Part, ...]:
        """Raises PlanError for a pin that fits no part."""
        parts = [part for group in _groups(self.inventory).items() for part in self._parts(*group)]
        for pin in self.pins:
            parts = pin.apply(parts)
        return tuple(parts)

    def _parts(self, key: tuple[int | None, PlanComponent], specs: list[TensorSpec]) -> Iterator[Part]:
        layer, component = key
        is_mtp = layer in self.inventory.mtp_layers
        on_gpu = self.budget.device != "cpu" and component in GPU_COMPONENTS and not is_mtp
        experts = (0, self.config.n_routed_experts) if component == "routed_expert" else None
        residency: Residency = "gpu" if on_gpu else "mapped"
        if experts is not None and not is_mtp:  # nobody runs those of MTP layers yet
            residency = self.budget.residency
        forms = component_forms(self.config, specs, self.available)
        part = Part(layer, component, experts, "gpu" if on_gpu else "ram", residency, forms, is_mtp=is_mtp)
        yield part if on_gpu and component not in FLOAT32_COMPONENTS else self._as_read(part, specs)

    def _as_read(self, part: Part, specs: list[TensorSpec]) -> Part:
        """A part in the forms that the runtime reads it in there."""
        if part.component == "kv_b" and self._reads_heads(part.forms[0]):
            return replace(part, forms=tuple(form for form in part.forms if self._reads_heads(form)))
        if part.component in FLOAT32_COMPONENTS or part.component == "kv_b":
            copied = part.tier == "ram" and part.forms[0].representation != "f32"
            whole = _form(self.config, specs, ["f32"] * len(specs))
            return replace(part, forms=(whole,), residency="copied" if copied else part.residency)
        # with a GPU it is the GPU that is short, if anything
        return part if self.budget.device == "cpu" else replace(part, forms=part.forms[:1])

    def _reads_heads(self, form: Form) -> bool:
        config = self.config
        return reads_heads(form.representation, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank)


@lru_cache(maxsize=4)
def _groups(inventory: Inventory) -> dict[tuple[int | None, PlanComponent], list[TensorSpec]]:
    """The tensors of each component of each layer."""
    groups: dict[tuple[int | None, PlanComponent], list[TensorSpec]] = {}
    for spec in inventory.tensors:
        groups.setdefault((spec.layer, planned_component(spec)), []).append(spec)
    return groups


def component_forms(config: ModelConfig, specs: Sequence[TensorSpec], available: Available) -> tuple[Form, ...]:
    """A component with its tensors at their most exact, and at their smallest if that is something else."""
    choices = [available(spec) for spec in specs]
    picks = [_form(config, specs, [choice[pick] for choice in choices]) for pick in (0, -1)]
    return tuple(dict.fromkeys(picks))


def expert_forms(inventory: Inventory, available: Available) -> list[Form]:
    """The routed experts of each layer but the MTP layers."""
    layers: dict[int | None, list[TensorSpec]] = {}
    for spec in inventory.by_component["routed_expert"]:
        if spec.layer not in inventory.mtp_layers:
            layers.setdefault(spec.layer, []).append(spec)
    return [_form(inventory.config, specs, [available(spec)[0] for spec in specs]) for specs in layers.values()]


def _form(config: ModelConfig, specs: Sequence[TensorSpec], chosen: Sequence[str]) -> Form:
    """The tensors `specs` of a component in their `chosen` representations; packed experts are whole records."""
    name = "+".join(dict.fromkeys(chosen))
    if specs[0].component == "routed_expert" and name in EXPERT_FORMATS:
        gate_up, down = EXPERT_FORMATS[name]
        record = ExpertRecord(gate_up, config.dim, config.moe_inter_dim, down)
        return Form(name, config.n_routed_experts * record.nbytes)
    return Form(name, sum(stored_bytes(one, spec.shape) for spec, one in zip(specs, chosen, strict=True)))

"""The planner: sizes and budgets in, a frozen plan out. It opens no file and needs no torch.

With a GPU, everything that each token reads goes there: attention, dense layers, shared experts, norms, routers and the
head, with the latent cache and the workspace. Routed experts, the embedding and the MTP layers stay in mapped files.
Where a machine has several NUMA nodes, routed experts are copied into their memory.
The most exact representations come first; where they do not fit, one component after the other takes its smallest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from offload.plan import (
    RAM_RESIDENCIES,
    Device,
    Placement,
    Plan,
    PlanComponent,
    PlanError,
    RamResidency,
    Residency,
    Tier,
    planned_component,
)
from offload.sizes import format_size
from offload.workspace import host_bytes, workspace_bytes
from quant.config import ModelConfig
from quant.errors import ContextError, UsageError
from quant.inventory import Inventory, TensorSpec, cache_bytes
from quant.packed import PACKED_FORMATS, reads_heads
from quant.recipes import DEFAULT_RECIPE, RECIPES
from quant.store_formats import ExpertFormats, representations, stored_bytes

DEFAULT_CONTEXT = 32768
PREFILL_CHUNKS = (512, 256, 128)  # tokens; the smaller ones where GPU memory is short
CUDA_RESERVE = 3 * 2**28  # bytes; context, libraries' handles and kernels
CONTEXT_STEP = 1024  # advice on the context comes in these steps
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}

# Where memory is short, these take their smallest representation, one group after the other.
LADDER: tuple[tuple[PlanComponent, ...], ...] = (("dense", "shared_expert"), ("attention",), ("kv_b",), ("head",))
GPU_COMPONENTS = frozenset({"attention", "kv_b", "dense", "shared_expert", "norm", "router", "head"})
# The runtime holds these in float32 whatever a checkpoint does, and so `kv_b` in RAM unless it is packed as attention
# reads it.
FLOAT32_COMPONENTS = ("norm", "router")

# Representations that may be chosen for a tensor, the most exact one first.
Available = Callable[[TensorSpec], Sequence[str]]


@dataclass(frozen=True)
class Budget:
    """What a plan may take and must hold. gpu_mem, ram: bytes. context: tokens. dtype: of activations and cache.

    residency: of routed experts. nodes: NUMA nodes to split them over if they are copied.
    """

    device: Device
    gpu_mem: int
    ram: int
    context: int
    dtype: str = "bfloat16"
    residency: RamResidency = "mapped"
    nodes: int = 1


def make_plan(inventory: Inventory, available: Available, budget: Budget, notes: Sequence[str] = ()) -> Plan:
    """Where everything goes. Raises PlanError, which says how much is short and what would fit."""
    for plan in _drafts(inventory, available, budget, tuple(notes)):
        if _fits(plan):
            return plan
    raise PlanError(_explain(plan, inventory, budget))


def choose_context(asked: int | None, maximum: int, notes: list[str]) -> int:
    """The context asked for, or the default, clamped to the model's `maximum` with a note."""
    if asked is None:
        if maximum < DEFAULT_CONTEXT:
            notes.append(f"context: {maximum} tokens, the model's maximum (the default is {DEFAULT_CONTEXT})")
        return min(DEFAULT_CONTEXT, maximum)
    if asked < 1:
        raise ContextError(f"a context of {asked} tokens is too small; give at least 1")
    if asked > maximum:
        raise ContextError(f"a context of {asked} tokens is more than the model's maximum; give at most {maximum}")
    return asked


def choose_residency(
    asked: str | None, inventory: Inventory, available: Available, node_bytes: Sequence[int], notes: list[str]
) -> RamResidency:
    """How routed experts live in RAM: as asked, or copied where there are several NUMA nodes, or else mapped.

    node_bytes: what each node has left. Raises UsageError for an unknown name, PlanError for what cannot be.
    """
    residency, forms = _parse_residency(asked), _expert_forms(inventory, available)
    if not all(_is_packed(form.representation) for form in forms):
        if residency in (None, "mapped"):
            return "mapped"
        raise PlanError(
            f"only a store's experts can be {residency}, and these are {forms[0].representation} as they were "
            "published; make a store with `dsr1 quantize`, or leave --residency out"
        )
    share, left = ceil(sum(form.nbytes for form in forms) / len(node_bytes)), min(node_bytes)
    is_split = len(node_bytes) > 1 and residency in (None, "copied")
    if not is_split or left >= share:
        return residency or ("copied" if is_split else "mapped")
    short = f"each of the {len(node_bytes)} NUMA nodes would take {format_size(share)} of the routed experts, and one "
    short += f"has {format_size(left)} free"
    if residency == "copied":
        raise PlanError(f"{short}; take --residency mapped, or free RAM there")
    notes.append(f"{short}, so they are mapped and not copied")
    return "mapped"


def _parse_residency(asked: str | None) -> RamResidency | None:
    for residency in RAM_RESIDENCIES:
        if residency == asked:
            return residency
    if asked is None:
        return None
    raise UsageError(f"there is no residency {asked!r}; give one of {', '.join(RAM_RESIDENCIES)}")


@dataclass(frozen=True)
class _Form:
    representation: str
    nbytes: int


@dataclass(frozen=True)
class _Part:
    """One component of one layer, before its representation is chosen."""

    layer: int | None
    component: PlanComponent
    experts: tuple[int, int] | None
    tier: Tier
    residency: Residency
    exact: _Form
    smallest: _Form

    def placed(self, reduced: Sequence[PlanComponent]) -> Placement:
        form = self.smallest if self.component in reduced else self.exact
        key = (self.layer, self.component, self.experts)
        return Placement(*key, self.tier, form.representation, self.residency, form.nbytes)


def _parts(inventory: Inventory, available: Available, budget: Budget) -> Iterator[_Part]:
    """The components of all layers, in the order in which a token meets them."""
    groups: dict[tuple[int | None, PlanComponent], list[TensorSpec]] = {}
    for spec in inventory.tensors:
        groups.setdefault((spec.layer, planned_component(spec)), []).append(spec)
    for (layer, component), specs in groups.items():
        is_mtp = layer in inventory.mtp_layers
        tier = _tier(component, budget.device, is_mtp)
        choices = [available(spec) for spec in specs]
        exact, smallest = (_form(inventory.config, specs, [choice[pick] for choice in choices]) for pick in (0, -1))
        residency: Residency = "gpu" if tier == "gpu" else "mapped"
        if component == "routed_expert" and not is_mtp:  # nobody runs those of MTP layers yet
            residency = budget.residency
        if component == "kv_b" and tier == "ram" and _reads_heads(inventory.config, exact):
            smallest = smallest if _reads_heads(inventory.config, smallest) else exact
        elif component in FLOAT32_COMPONENTS or component == "kv_b" and tier == "ram":
            if tier == "ram" and exact.representation != "f32":
                residency = "copied"
            exact = smallest = _form(inventory.config, specs, ["f32"] * len(specs))
        elif tier == "ram" and budget.device != "cpu":
            smallest = exact  # it is the GPU that is short, if anything
        experts = (0, inventory.config.n_routed_experts) if component == "routed_expert" else None
        yield _Part(layer, component, experts, tier, residency, exact, smallest)


def _reads_heads(config: ModelConfig, form: _Form) -> bool:
    return reads_heads(form.representation, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank)


def _expert_forms(inventory: Inventory, available: Available) -> list[_Form]:
    """The routed experts of each layer but the MTP layers."""
    layers: dict[int | None, list[TensorSpec]] = {}
    for spec in inventory.by_component["routed_expert"]:
        if spec.layer not in inventory.mtp_layers:
            layers.setdefault(spec.layer, []).append(spec)
    return [_form(inventory.config, specs, [available(spec)[0] for spec in specs]) for specs in layers.values()]


def _tier(component: PlanComponent, device: Device, is_mtp: bool) -> Tier:
    return "gpu" if device != "cpu" and component in GPU_COMPONENTS and not is_mtp else "ram"


def _form(config: ModelConfig, specs: Sequence[TensorSpec], chosen: Sequence[str]) -> _Form:
    """The tensors `specs` of a component in their `chosen` representations; packed experts are whole records."""
    name = "+".join(dict.fromkeys(chosen))
    if specs[0].component == "routed_expert" and _is_packed(name):
        gate, _, down = (PACKED_FORMATS[one] for one in chosen[:3])  # the first expert's w1, w3 and w2
        record = ExpertFormats(gate, down).record(config.dim, config.moe_inter_dim)
        return _Form(record.format_name, config.n_routed_experts * record.nbytes)
    return _Form(name, sum(stored_bytes(one, spec.shape) for spec, one in zip(specs, chosen, strict=True)))


def _is_packed(representation: str) -> bool:
    return all(name in PACKED_FORMATS for name in representation.split("+"))


def _drafts(inventory: Inventory, available: Available, budget: Budget, notes: tuple[str, ...] = ()) -> Iterator[Plan]:
    """Plans to try: from the most exact to the smallest."""
    config, parts = inventory.config, list(_parts(inventory, available, budget))
    chunk, *smaller = dict.fromkeys(min(chunk, budget.context) for chunk in PREFILL_CHUNKS)
    reduced: tuple[PlanComponent, ...] = ()
    yield _draft(config, parts, budget, reduced, chunk, notes)
    for components in LADDER:
        reduced += components
        yield _draft(config, parts, budget, reduced, chunk, notes)
    for chunk in smaller:
        yield _draft(config, parts, budget, reduced, chunk, notes)


def _draft(
    config: ModelConfig,
    parts: Sequence[_Part],
    budget: Budget,
    reduced: Sequence[PlanComponent],
    chunk: int,
    notes: tuple[str, ...],
) -> Plan:
    placements = tuple(part.placed(reduced) for part in parts)
    size = DTYPE_BYTES[budget.dtype]
    return Plan(
        device=budget.device,
        gpu_budget=budget.gpu_mem,
        ram_budget=budget.ram,
        n_layers=config.n_layers,
        context=budget.context,
        prefill_chunk=chunk,
        cache_dtype=budget.dtype,
        cache_bytes=cache_bytes(config, budget.context, size),
        workspace_bytes=workspace_bytes(config, chunk, size),
        reserve_bytes=0 if budget.device == "cpu" else CUDA_RESERVE,
        host_bytes=host_bytes(config, chunk),
        decode_ram_bytes=_decode_ram_bytes(config, placements),
        placements=placements,
        notes=notes,
        nodes=budget.nodes if budget.residency == "copied" else 1,
    )


def _decode_ram_bytes(config: ModelConfig, placements: Sequence[Placement]) -> int:
    """Bytes of weights in RAM that one token reads: its experts, and what else stands there but a row of the embedding.

    MTP layers are left out.
    """
    total = 0
    for placement in placements:
        is_mtp = placement.layer is not None and placement.layer >= config.n_layers
        if placement.tier != "ram" or placement.component == "embed" or is_mtp:
            continue
        if placement.component == "routed_expert":
            total += placement.nbytes * config.n_activated_experts // config.n_routed_experts
        else:
            total += placement.nbytes
    return total


def _fits(plan: Plan) -> bool:
    return plan.ram_bytes <= plan.ram_budget and (not plan.on_gpu or plan.gpu_bytes <= plan.gpu_budget)


@dataclass(frozen=True)
class _Shortage:
    """A memory that is too small for the smallest plan."""

    what: str
    option: str
    needed: int
    budget: int
    cache_bytes_per_token: float  # 0 where the cache is elsewhere

    @property
    def missing(self) -> int:
        return self.needed - self.budget

    def sentence(self) -> str:
        return (
            f"{self.what} takes {format_size(self.needed)} and {self.option} is {format_size(self.budget)}: "
            f"{format_size(self.missing)} short"
        )

    def context_that_fits(self, context: int) -> int:
        """Tokens, whole steps; 0 if no context helps."""
        if not self.cache_bytes_per_token:
            return 0
        return max(0, int(context - self.missing / self.cache_bytes_per_token) // CONTEXT_STEP * CONTEXT_STEP)


def _explain(smallest: Plan, inventory: Inventory, budget: Budget) -> str:
    """What is short and what would fit, for a model of which not even the `smallest` plan does."""
    shortages, advice = _shortages(smallest), []
    if context := min(shortage.context_that_fits(budget.context) for shortage in shortages):
        advice.append(f"--context {context} fits")
    formats = RECIPES[DEFAULT_RECIPE].of(inventory.config)
    *_, store = _drafts(inventory, lambda spec: representations(spec, formats), budget)
    if _fits(store):
        advice.append("the 4-bit store that `dsr1 quantize` makes of the published checkpoint fits")
    needs = " and ".join(f"{shortage.option} {ceil(shortage.needed / 2**30)}G" for shortage in shortages)
    advice.append(f"as it is, it needs {needs}" if advice else f"it needs {needs}")
    return "; ".join([shortage.sentence() for shortage in shortages] + advice)


def _shortages(plan: Plan) -> list[_Shortage]:
    per_token = plan.cache_bytes / plan.context
    gpu = _Shortage("the GPU part at its smallest", "--gpu-mem", plan.gpu_bytes, plan.gpu_budget, per_token)
    ram_per_token = 0.0 if plan.on_gpu else per_token
    ram = _Shortage(_ram_part(plan), "--ram", plan.ram_bytes, plan.ram_budget, ram_per_token)
    return [shortage for shortage in ([gpu, ram] if plan.on_gpu else [ram]) if shortage.missing > 0]


def _ram_part(plan: Plan) -> str:
    experts = sum(placement.nbytes for placement in plan.placements if placement.component == "routed_expert")
    return f"what stays in RAM ({format_size(experts)} of it routed experts)"

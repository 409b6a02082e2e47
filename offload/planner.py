"""The planner: sizes and budgets in, the best plan out. It opens no file and needs no torch.

With a GPU, everything that each token reads goes there: attention, dense layers, shared experts, norms, routers and the
head, with the latent cache and the workspace. Routed experts, the embedding and the MTP layers stay in RAM.

Plans are compared in this order, and the first that fits is the best one:
    1. quality: LADDER says what takes its smaller form first, where memory is short;
    2. predicted speed of prefill: chunks, and whether long ones stream experts, as `Planning.prefills` has them;
    3. routed experts on the GPU, as many as there is room for, the most used ones first (expert_places.py).
More memory never makes the plan worse in this order, because every plan that fits less memory fits more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from offload.costs import WORTH, Costs
from offload.deferral import deferral_of
from offload.expert_places import Usage, place_experts
from offload.machine import Machine
from offload.parts import Available, Budget, Part, Parts, expert_forms
from offload.pins import Pin, pinned_cache, pinned_chunk, pinned_stream
from offload.plan import (
    RAM_RESIDENCIES,
    SLICE_EXPERTS,
    STAGING_SLOTS,
    Placement,
    Plan,
    PlanComponent,
    PlanError,
    RamResidency,
    Streaming,
    Transfers,
    is_streamable,
)
from offload.reasons import reasons
from offload.shortage import Shortages
from offload.sizes import format_size
from offload.workspace import device_expert_bytes, host_bytes, workspace_bytes
from quant.config import ModelConfig
from quant.errors import ContextError, UsageError
from quant.inventory import CacheFormat, Inventory, cache_bytes
from quant.packed import EXPERT_FORMATS

DEFAULT_CONTEXT = 32768
PREFILL_CHUNKS = (128, 256, 512, 1024, 2048, 4096)  # tokens
CUDA_CONTEXT = 3 * 2**28  # bytes; libraries' handles and kernels among them
ALLOCATOR_RESERVE = 2**28  # bytes; rounding, and gaps that blocks of other sizes leave
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
DTYPE_CACHES: dict[str, CacheFormat] = {"bfloat16": "bfloat16", "float32": "float32"}

# Where memory is short, these take their smaller form, one group after the other: the least harmful first. 8 bits with
# a scale for 128 latents change a cache by 0.6 % of its values' size, 4 bits a matrix by 7 to 11 %.
LADDER: tuple[tuple[PlanComponent, ...], ...] = (("dense", "shared_expert"), ("attention",), ("kv_b",), ("head",))


@dataclass(frozen=True)
class Level:
    """A quality: the form of the cache, and the components that take their smallest form."""

    cache: CacheFormat
    reduced: tuple[PlanComponent, ...]


@dataclass(frozen=True)
class Prefill:
    """How prompts are run. chunk: most tokens of a pass. streams: whether long passes send experts to the GPU."""

    chunk: int
    streams: bool


@dataclass(frozen=True)
class Planning:
    """What a plan is made from. machine: whose speed is predicted. usage: how often experts are used, if known."""

    inventory: Inventory
    available: Available
    budget: Budget
    machine: Machine
    pins: tuple[Pin, ...] = ()
    usage: Usage | None = None
    notes: tuple[str, ...] = ()
    model: str = ""
    parts: Parts = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", Parts(self.inventory, self.available, self.budget, self.pins))

    @property
    def config(self) -> ModelConfig:
        return self.inventory.config

    @property
    def unpinned(self) -> tuple[Part, ...]:
        """The parts, whatever the pins say."""
        return Parts(self.inventory, self.available, self.budget).all

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.config, self.machine)

    def levels(self) -> list[Level]:
        """Qualities to try, the best one first."""
        exact = DTYPE_CACHES[self.budget.dtype]
        caches = [pinned_cache(self.pins) or exact]
        if caches[0] == "bfloat16" and pinned_cache(self.pins) is None and self._int8_saves:
            caches.append("int8")
        levels = [Level(cache, ()) for cache in caches]
        reduced: tuple[PlanComponent, ...] = ()
        for components in LADDER:
            reduced += components
            levels.append(Level(caches[-1], reduced))
        return levels

    @cached_property
    def _int8_saves(self) -> bool:
        """Whether a cache in 8 bits makes the smallest plan smaller: not where unpacking takes more than it saves."""
        if not _takes_int8(self.config):
            return False
        prefill = Prefill(min(PREFILL_CHUNKS[0], self.budget.context), streams=False)
        exact, packed = draft(self, Level("bfloat16", ()), prefill), draft(self, Level("int8", ()), prefill)
        return packed.gpu_bytes + packed.ram_bytes < exact.gpu_bytes + exact.ram_bytes

    @cached_property
    def prefills(self) -> list[Prefill]:
        """Ways of prefill to try, the fastest one first.

        From the one that takes the least of a GPU on, each that is worth its memory by predicted speed. No budget
        counts here, so more memory cannot change the order.
        """
        best, *_ = self.levels()
        drafts = [(prefill, draft(self, best, prefill)) for prefill in self._possible_prefills()]
        drafts = [(prefill, plan) for prefill, plan in drafts if prefill.streams == (plan.streaming is not None)]
        order: list[Prefill] = []
        speed = 0.0
        for prefill, plan in sorted(drafts, key=lambda one: one[1].gpu_bytes if one[1].on_gpu else 0):
            predicted = self.costs.chunk_tok_s(plan)
            if not order or predicted >= WORTH * speed:
                order.append(prefill)
                speed = predicted
        return order[::-1]

    def _possible_prefills(self) -> list[Prefill]:
        pinned, stream = pinned_chunk(self.pins), pinned_stream(self.pins)
        chunks = dict.fromkeys(
            min(chunk, self.budget.context) for chunk in (PREFILL_CHUNKS if pinned is None else (pinned,))
        )
        ways = (False,) if stream == "off" else (False, True) if stream is None else (True,)
        return [Prefill(chunk, streams) for streams in ways for chunk in chunks]

    def streaming(self, plan: Plan) -> Streaming | None:
        """How the experts of a plan that are in RAM are streamed, if that is possible, and sooner done or asked for."""
        if not plan.on_gpu or not any(is_streamable(placement, plan.n_layers) for placement in plan.placements):
            return None
        size, asked = min(SLICE_EXPERTS, self.config.n_routed_experts), pinned_stream(self.pins)
        least = asked if isinstance(asked, int) else self.costs.stream_from(plan, size)
        return None if least is None else Streaming(least, size)

    def drafts(self) -> Iterator[tuple[Level, Plan]]:
        """Plans to try, the best one first; the last one is the smallest."""
        for level in self.levels():
            for prefill in self.prefills:
                yield level, draft(self, level, prefill)


def make_plan(planning: Planning) -> Plan:
    """The best plan that fits. Raises PlanError, which says how much is short and what would fit."""
    if planning.budget.device == "cpu" and any(part.tier == "gpu" for part in planning.parts.all):
        raise PlanError("--pin puts experts on a GPU, and this plan has none; give --gpu-mem, or leave the pin out")
    if not planning.prefills:
        raise PlanError(
            "--pin streams experts, and only a store's experts in RAM can be streamed to a GPU; "
            "give --gpu-mem and a store, or leave the pin out"
        )
    found, smallest = find_plan(planning)
    if found is None:
        raise PlanError(Shortages(planning, smallest, find_plan).text())
    return found


def find_plan(planning: Planning) -> tuple[Plan | None, Plan]:
    """The best plan that fits, if there is one, and the last that was tried."""
    tried: dict[Level, Plan] = {}  # of each level the smallest one
    for level, plan in planning.drafts():
        filled = place_experts(plan, planning.parts.all, planning.usage, _room(planning, plan))
        counted = recount(planning.config, filled)
        if fits(counted):
            return replace(counted, reasons=tuple(reasons(planning, level, counted, tried))), counted
        tried[level] = counted
    return None, counted


def draft(planning: Planning, level: Level, prefill: Prefill) -> Plan:
    """A plan of some quality and way of prefill, with no experts on the GPU but pinned ones."""
    budget = planning.budget
    plan = replace(
        empty_plan(planning),
        prefill_chunk=prefill.chunk,
        cache_format=level.cache,
        placements=tuple(part.placed(level.reduced) for part in planning.parts.all),
        nodes=budget.nodes if budget.residency == "copied" else 1,
    )
    plan = replace(plan, streaming=planning.streaming(plan) if prefill.streams else None)
    return recount(planning.config, plan)


def empty_plan(planning: Planning) -> Plan:
    """A plan without any placement, for one token at a time."""
    budget, config = planning.budget, planning.config
    on_gpu = budget.device != "cpu"
    return Plan(
        model=planning.model,
        device=budget.device,
        gpu_budget=budget.gpu_mem,
        ram_budget=budget.ram,
        n_layers=config.n_layers,
        context=budget.context,
        prefill_chunk=1,
        dtype=budget.dtype,
        cache_format=DTYPE_CACHES[budget.dtype],
        cache_bytes=0,
        workspace_bytes=0,
        context_bytes=CUDA_CONTEXT if on_gpu else 0,
        allocator_bytes=ALLOCATOR_RESERVE if on_gpu else 0,
        host_bytes=0,
        decode_ram_bytes=0,
        transfers=None,
        placements=(),
        notes=planning.notes,
        deferred_experts=budget.deferred_experts,
    )


def recount(config: ModelConfig, plan: Plan) -> Plan:
    """The plan with all that follows from its placements, cache, chunk and context counted anew."""
    plan = replace(plan, streaming=_staged(plan))
    return replace(
        plan,
        cache_bytes=cache_bytes(config, plan.context, plan.cache_format),
        workspace_bytes=workspace_bytes(config, plan),
        host_bytes=host_bytes(config, plan.host_tokens),
        decode_ram_bytes=_decode_ram_bytes(config, plan.placements),
        transfers=_transfers(config, plan) if plan.on_gpu else None,
    )


def _staged(plan: Plan) -> Streaming | None:
    """A plan's streaming with the bytes of its buffers, and of all that is streamed; None where that is nothing."""
    streamed = [placement for placement in plan.placements if is_streamable(placement, plan.n_layers)]
    if plan.streaming is None or not streamed:
        return None
    record = max(placement.nbytes // placement.expert_count for placement in streamed)
    staging = STAGING_SLOTS * plan.streaming.slice_experts * record
    return replace(plan.streaming, staging_bytes=staging, bytes_a_pass=sum(placement.nbytes for placement in streamed))


def fits(plan: Plan) -> bool:
    """Whether a plan keeps to its budgets."""
    return plan.ram_bytes <= plan.ram_budget and (not plan.on_gpu or plan.gpu_bytes <= plan.gpu_budget)


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
    residency, forms = _parse_residency(asked), expert_forms(inventory, available)
    if any(form.representation not in EXPERT_FORMATS for form in forms):
        if residency in (None, "mapped"):
            return "mapped"
        raise PlanError(
            f"only a store's experts can be {residency}, and these are {forms[0].representation} as they were "
            "published; make a store with `dsr1 quantize`, or leave --residency out"
        )
    share, left = -(-sum(form.nbytes for form in forms) // len(node_bytes)), min(node_bytes)
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


def _takes_int8(config: ModelConfig) -> bool:
    """Whether the scales behind a token's latents lie as float32 must: every known model's do."""
    return config.kv_lora_rank % 4 == 0


def _room(planning: Planning, plan: Plan) -> int:
    """Bytes of the GPU that routed experts may take; less than 0 if the rest does not fit."""
    if not plan.on_gpu:
        return 0
    extra = 0 if plan.gpu_experts() else device_expert_bytes(planning.config, plan)
    return plan.gpu_budget - plan.gpu_bytes - extra


def _decode_ram_bytes(config: ModelConfig, placements: Sequence[Placement]) -> int:
    """Bytes of weights in RAM that one token reads: its experts, and what else stands there but a row of the embedding.

    MTP layers are left out. Experts count as if all were used as often.
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


def _transfers(config: ModelConfig, plan: Plan) -> Transfers:
    """x (float32), ids (int64) and router weights (float32) of experts go down, their sums (float32) come up."""
    layers = plan.layers_with_host_experts
    down = len(layers) * (4 * config.dim + 12 * config.n_activated_experts)
    embedded = config.dim * DTYPE_BYTES[plan.dtype]
    late = 4 * config.dim * sum(deferral_of(plan, layer).joins for layer in layers)
    return Transfers(embedded, down, len(layers) * 4 * config.dim, 4 * config.vocab_size, late)

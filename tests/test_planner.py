"""The planner: known figures of R1, what fits where, and what is said if nothing does."""

import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import hardware
from offload.expert_places import Usage
from offload.hardware import GpuMemory, choose_device
from offload.machine import load_machine
from offload.parts import Available, Budget
from offload.pins import parse_pins
from offload.plan import PLAN_VERSION, Plan, PlanError
from offload.planner import LADDER, Planning, choose_context, choose_residency, make_plan
from quant.config import ModelConfig, parse_config
from quant.errors import ContextError, DeviceError, UsageError
from quant.inventory import Inventory, TensorSpec
from quant.packed import ACCURATE, Q8
from quant.recipes import RECIPES
from quant.shapes import KNOWN_MODELS, known_shape, shape_of
from quant.store_formats import representations
from tests.tiny_checkpoint import RAGGED, tiny_config

GIB = 2**30
R1 = "deepseek-ai/DeepSeek-R1"
TINY_CONFIG = parse_config(tiny_config())
MACHINE = load_machine("rtx-4090-ddr5")


def config_of(hub_id: str) -> ModelConfig:
    shape = known_shape(hub_id)
    assert shape is not None
    return shape.config


def store_of(recipe: str, config: ModelConfig) -> Available:
    formats = RECIPES[recipe].of(config)
    return lambda spec: representations(spec, formats)


def published(spec: TensorSpec) -> tuple[str, ...]:
    return spec.representations[:1]


def plan_with(config: ModelConfig, budget: Budget, available: Available, *pins: str) -> Plan:
    return make_plan(Planning(Inventory.of(config), available, budget, MACHINE, parse_pins(pins)))


def plan_for(config: ModelConfig, budget: Budget, recipe: str = "balanced", *pins: str) -> Plan:
    return plan_with(config, budget, store_of(recipe, config), *pins)


def plan_r1(gpu: float, ram: float, context: int, *pins: str, recipe: str = "balanced") -> Plan:
    return plan_for(config_of(R1), Budget("cuda", int(gpu * GIB), int(ram * GIB), context), recipe, *pins)


def of_component(plan: Plan, component: str) -> float:
    """GiB of a component in the model proper."""
    placements = [p for p in plan.placements if p.component == component and (p.layer or 0) < plan.n_layers]
    return sum(p.nbytes for p in placements) / GIB


def formats(plan: Plan) -> dict[str, str]:
    layers = {"dense": 0, "shared_expert": 5, "attention": 5, "kv_b": 5, "head": None}
    return {component: plan.representation(layer, component) for component, layer in layers.items()}  # type: ignore[arg-type]


def q8_gib(params: float) -> float:
    return params * 8.25 / 8 / GIB


def four_bit_gib(params: float) -> float:
    return params * 4.5 / 8 / GIB


# R1 by hand, from the shapes in config.json:
#   attention without kv_b  61 x (7168 x 1536 + 1536 x 24576 + 7168 x 576 + 16384 x 7168)  = 10.389e9 values
#   kv_b                    61 x 32768 x 512                                              =  1.023e9
#   dense layers             3 x 3 x 7168 x 18432                                         =  1.189e9
#   shared experts          58 x 3 x 7168 x 2048                                          =  2.554e9
#   head                    129280 x 7168                                                 =  0.927e9
#   routers, norms in f32   58 x 256 x 7168 x 4 bytes and a few MiB                       =  0.400 GiB
#   routed experts          58 x 256 x 44.04e6 at 4.5 bits                                = 342.6 GiB, 23.6 MiB each
#   a token of the cache    61 x 576 x 2 bytes = 68.6 KiB; in 8 bits 61 x 656             = 39.1 KiB
ATTENTION, KV_B, DENSE, SHARED, HEAD = 10.389e9, 1.023e9, 1.189e9, 2.554e9, 0.927e9
ALWAYS = 0.40  # GiB
RESERVES = 0.75 + 0.25  # GiB; CUDA's own, its allocator's


def gpu_without_experts(plan: Plan) -> float:
    """GiB of weights on the GPU that are no routed experts."""
    return sum(p.nbytes for p in plan.placements if p.tier == "gpu" and p.experts is None) / GIB


def test_24_gib_and_32k_by_hand() -> None:
    """All at 8.25 bits: 16.08e9 values are 15.45 GiB; with routers, cache and reserves 18.99 GiB; 5 GiB are left."""
    plan = plan_r1(24, 384, 32768)
    assert set(formats(plan).values()) == {"q8"} and plan.cache_format == "bfloat16"
    assert gpu_without_experts(plan) == pytest.approx(
        q8_gib(ATTENTION + KV_B + DENSE + SHARED + HEAD) + ALWAYS, abs=0.02
    )
    assert plan.cache_bytes == 32768 * 61 * 576 * 2 and plan.cache_bytes / GIB == pytest.approx(2.14, abs=0.01)
    assert plan.reserve_bytes / GIB == RESERVES
    fixed = gpu_without_experts(plan) + 2.14 + RESERVES
    assert fixed == pytest.approx(18.99, abs=0.03)
    taken = fixed + (plan.workspace_bytes + plan.staging_bytes) / GIB
    experts = (24 - taken) * 1024 / 23.63  # what is left, by an expert's size
    assert plan.gpu_experts() == pytest.approx(experts, abs=3) and plan.gpu_experts() > 100
    assert of_component(plan, "routed_expert") == pytest.approx(342.6, abs=0.05)
    assert plan.decode_ram_bytes == pytest.approx(11.494e9 * (1 - plan.gpu_experts() / 58 / 256), rel=1e-3)


def test_24_gib_and_128k_by_hand() -> None:
    """A 16-bit cache is 8.58 GiB: 15.85 + 8.58 + 1.00 = 25.4 GiB. In 8 bits it is 4.89: 21.7 GiB, all else as exact."""
    plan = plan_r1(24, 384, 131072)
    assert plan.cache_format == "int8" and plan.cache_bytes == 131072 * 61 * 656
    assert set(formats(plan).values()) == {"q8"}
    assert gpu_without_experts(plan) + plan.cache_bytes / GIB + RESERVES == pytest.approx(21.74, abs=0.03)
    assert plan.workspace_bytes / GIB < 24 - 21.7


def test_16_gib_and_8k_by_hand() -> None:
    """At 8 bits 15.85 GiB + 1.00 do not fit. Dense layers and shared experts at 4.5 bits give back 1.63 GiB: 15.22
    with the reserves, and 0.31 for a cache in 8 bits; 0.47 are left for the workspace, enough for 1024 tokens."""
    plan = plan_r1(16, 384, 8192)
    assert formats(plan) == {
        "dense": "accurate",
        "shared_expert": "accurate",
        "attention": "q8",
        "kv_b": "q8",
        "head": "q8",
    }
    by_hand = q8_gib(ATTENTION + KV_B + HEAD) + four_bit_gib(DENSE + SHARED) + ALWAYS
    assert gpu_without_experts(plan) == pytest.approx(by_hand, abs=0.02) and by_hand == pytest.approx(14.22, abs=0.03)
    assert plan.cache_format == "int8" and plan.cache_bytes / GIB == pytest.approx(0.305, abs=0.001)
    assert plan.prefill_chunk == 1024 and plan.workspace_bytes / GIB < 0.47


def test_12_gib_and_4k_by_hand() -> None:
    """With attention at 4.5 bits, too: 5.44 + 0.98 + 1.96 + 0.89 + 0.40 = 9.67 GiB; 0.15 of cache and 1.00 of reserves
    leave 1.18 GiB for the workspace. kv_b and the head stay at 8 bits."""
    plan = plan_r1(12, 384, 4096)
    reduced = {component for component, fmt in formats(plan).items() if fmt == "accurate"}
    assert reduced == {"dense", "shared_expert", "attention"}
    by_hand = q8_gib(KV_B + HEAD) + four_bit_gib(ATTENTION + DENSE + SHARED) + ALWAYS
    assert gpu_without_experts(plan) == pytest.approx(by_hand, abs=0.02) and by_hand == pytest.approx(9.67, abs=0.03)
    assert plan.workspace_bytes / GIB < 12 - 9.67 - 0.15 - RESERVES


def test_256_gib_of_ram_by_hand() -> None:
    """RAM needs 342.6 of experts, 1.7 of embedding, 8.9 of the MTP layer: 353.1 GiB, 97 more than there are. The least
    that would do has everything on the GPU at 4.5 bits, and so room for 13 to 14 GiB of experts there."""
    with pytest.raises(PlanError) as error:
        plan_r1(24, 256, 8192)
    message = str(error.value)
    [needed] = map(int, re.findall(r"it needs --ram (\d+)G", message))
    assert 353 - 14 <= needed <= 353 - 13 + 1
    [short] = re.findall(r"([\d.]+) GiB short", message)
    assert float(short) == pytest.approx(needed - 256, abs=1)
    assert plan_r1(24, needed, 8192).ram_bytes <= needed * GIB
    with pytest.raises(PlanError):
        plan_r1(24, needed - 1, 8192)
    [exact] = map(int, re.findall(r"--ram (\d+)G with all else as exact as it is", message))
    assert needed < exact <= 354
    assert set(formats(plan_r1(24, exact, 8192)).values()) == {"q8"}


def test_80_gib_of_gpu_by_hand() -> None:
    """18.99 GiB are taken as with 24; 61.0 GiB less the workspace hold ten layers of 256 x 23.63 MiB = 5.91 GiB."""
    plan = plan_r1(80, 512, 32768)
    assert set(formats(plan).values()) == {"q8"} and plan.cache_format == "bfloat16"
    layers = [layer for layer in range(3, 61) if all(p.tier == "gpu" for p in plan.expert_placements(layer))]
    assert len(layers) in (9, 10) and layers == list(range(3, 3 + len(layers)))
    left = (80 - 18.99 - (plan.workspace_bytes + plan.staging_bytes) / GIB) * 1024 / 23.63
    assert plan.gpu_experts() == pytest.approx(left, abs=40)
    assert plan.gpu_bytes <= 80 * GIB


def test_workspace_and_ram_of_r1() -> None:
    plan = plan_r1(24, 384, 32768, "chunk=512")
    assert plan.prefill_chunk == 512
    assert 0.2 < plan.workspace_bytes / GIB < 0.25
    everything = plan_r1(24, 384, 32768, "chunk=512", "experts=mapped")
    assert 353 < everything.ram_bytes / GIB < 354  # 342.6 experts, 1.7 embedding, 8.8 MTP layer, buffers
    assert everything.gpu_experts() == 0


def test_the_ladder_goes_down_in_order_and_no_further_than_needed() -> None:
    """The cache first, then component after component; between two steps the chunk shrinks as far as it may."""
    found: list[tuple[str, frozenset[str]]] = []
    gpu = 21.0
    while True:
        try:
            plan = plan_r1(gpu, 384, 32768)
        except PlanError:
            break
        assert plan.gpu_bytes <= gpu * GIB
        reduced = frozenset(component for component, fmt in formats(plan).items() if fmt == "accurate")
        if not found or found[-1] != (plan.cache_format, reduced):
            found.append((plan.cache_format, reduced))
        gpu -= 0.25
    steps = [frozenset[str]()]
    for components in LADDER:
        steps.append(steps[-1] | set(components))
    assert found == [("bfloat16", steps[0]), *(("int8", step) for step in steps)]
    assert plan.prefill_chunk <= 256


def test_what_r1_lacks_is_said_with_what_would_do() -> None:
    with pytest.raises(PlanError, match="--recipe fast"):
        plan_r1(24, 330, 32768)
    assert plan_r1(24, 330, 32768, recipe="fast").ram_bytes <= 330 * GIB
    for recipe, ram, said in (
        ("accurate", 346, "balanced (4.5 "),
        ("accurate", 330, "fast (4.25 "),
        ("q8", 346, "balanced"),
    ):
        with pytest.raises(PlanError, match=re.escape(f"--recipe {said}")):
            plan_r1(24, ram, 32768, recipe=recipe)
    with pytest.raises(PlanError, match="^(?!.*--recipe)"):
        plan_r1(24, 300, 32768, recipe="fast")


@pytest.mark.parametrize("gpu", [11, 16])
def test_the_context_that_is_said_to_fit_fits_and_a_step_more_does_not(gpu: int) -> None:
    with pytest.raises(PlanError, match="--gpu-mem") as error:
        plan_r1(gpu, 384, 163840)
    [context] = map(int, re.findall(r"--context (\d+) fits", str(error.value)))
    assert plan_r1(gpu, 384, context).context == context
    with pytest.raises(PlanError):
        plan_r1(gpu, 384, context + 1024)
    [needed] = map(int, re.findall(r"needs --gpu-mem (\d+)G", str(error.value)))
    assert plan_r1(needed, 384, 163840)
    with pytest.raises(PlanError):
        plan_r1(needed - 1, 384, 163840)


def test_no_context_is_offered_where_none_helps() -> None:
    with pytest.raises(PlanError) as error:
        plan_r1(8, 256, 4096)
    message = str(error.value)
    assert "--context" not in message and "quantize" not in message
    assert re.search(r"it needs --gpu-mem \d+G and --ram \d+G", message)


def test_a_published_checkpoint_that_is_too_large_points_to_quantize() -> None:
    budget = Budget("cuda", 24 * GIB, 384 * GIB, 32768)
    with pytest.raises(PlanError, match="the 4-bit store that `dsr1 quantize` makes of the published checkpoint fits"):
        plan_with(config_of(R1), budget, published)
    with pytest.raises(PlanError, match="needs --gpu-mem") as error:
        plan_with(config_of(R1), replace(budget, gpu_mem=GIB), published)
    assert "quantize" not in str(error.value)


def test_tiers_and_residency_with_a_gpu() -> None:
    plan = plan_for(TINY_CONFIG, Budget("emulate", 2 * GIB, GIB, 256), "balanced", "experts=mapped")
    for placement in plan.placements:
        assert placement.layer is not None or placement.component in ("embed", "norm", "head")
        in_ram = placement.component in ("embed", "routed_expert", "mtp") or placement.layer == 3
        assert (placement.tier == "ram") == in_ram
        assert placement.residency == ("mapped" if in_ram else "gpu")
    experts = plan.placement(1, "routed_expert")
    assert experts.experts == (0, 16) and experts.representation == "accurate"
    with pytest.raises(KeyError):
        plan.representation(0, "routed_expert")
    assert plan.gpu_bytes - plan.weight_bytes("gpu") == plan.cache_bytes + plan.workspace_bytes + plan.reserve_bytes
    assert plan.ram_bytes - plan.weight_bytes("ram") == plan.host_bytes


def test_everything_is_in_ram_on_a_cpu() -> None:
    plan = plan_for(TINY_CONFIG, Budget("cpu", 0, GIB, 256))
    assert plan.gpu_bytes == plan.reserve_bytes == 0
    assert {placement.tier for placement in plan.placements} == {"ram"}
    kv_b = plan.placement(1, "kv_b")
    assert (kv_b.representation, kv_b.residency, kv_b.nbytes) == ("q8", "mapped", 16 * 2112)  # [256, 128]: 16 blocks
    assert plan.representation(1, "attention") == "q8"
    buffers = plan.cache_bytes + plan.workspace_bytes + plan.host_bytes
    assert plan.ram_bytes == plan.weight_bytes("ram") + buffers
    experts = sum(p.nbytes for p in plan.placements if p.component == "routed_expert" and p.layer in (1, 2))
    left = [p for p in plan.placements if p.component not in ("routed_expert", "embed") and p.layer != 3]
    assert plan.decode_ram_bytes == experts // 4 + sum(p.nbytes for p in left)  # 4 of 16 experts


def choose(asked: str | None, nodes: list[int], as_published: bool = False) -> tuple[str, list[str]]:
    """The residency of the tiny model's experts, and the notes."""
    notes: list[str] = []

    def available(spec: TensorSpec) -> tuple[str, ...]:
        return spec.representations[:1] if as_published else representations(spec, RECIPES["balanced"].of(TINY_CONFIG))

    return choose_residency(asked, Inventory.of(TINY_CONFIG), available, nodes, notes), notes


def test_experts_are_mapped_on_one_node_and_copied_to_several() -> None:
    assert choose(None, [0]) == ("mapped", [])
    assert choose(None, [GIB, GIB]) == ("copied", [])
    for asked in ("mapped", "locked", "copied"):
        assert choose(asked, [0]) == choose(asked, [GIB] * 4) == (asked, [])
    with pytest.raises(UsageError, match="'swapped'.*mapped, locked, copied"):
        choose("swapped", [0])


def test_nodes_without_room_for_their_share_get_none() -> None:
    plan = plan_for(TINY_CONFIG, Budget("cpu", 0, GIB, 256))
    experts = sum(p.nbytes for p in plan.placements if p.component == "routed_expert" and p.layer != 3)
    assert choose(None, [experts // 2, GIB]) == ("copied", [])
    residency, notes = choose(None, [experts // 2 - 1, GIB])
    assert residency == "mapped" and "one has" in notes[0]
    assert choose("locked", [5, 5]) == ("locked", [])
    with pytest.raises(PlanError, match="--residency mapped"):
        choose("copied", [GIB, 5])


def test_experts_of_a_checkpoint_are_mapped() -> None:
    assert choose(None, [GIB, GIB], as_published=True) == choose("mapped", [GIB], as_published=True) == ("mapped", [])
    with pytest.raises(PlanError, match="only a store's experts can be copied.*fp8_block"):
        choose("copied", [GIB], as_published=True)


@pytest.mark.parametrize("device", ["cpu", "emulate"])
def test_a_plan_has_the_experts_where_they_shall_be(device: str) -> None:
    alone = plan_for(TINY_CONFIG, Budget(device, 2 * GIB, GIB, 256), "balanced", "experts=mapped")  # type: ignore[arg-type]
    budget = Budget(device, alone.gpu_bytes, GIB, 256)  # type: ignore[arg-type]  # which has no room for experts
    mapped, copied = plan_for(TINY_CONFIG, budget), plan_for(TINY_CONFIG, replace(budget, residency="copied", nodes=2))
    assert (mapped.nodes, copied.nodes, copied.ram_bytes) == (1, 2, mapped.ram_bytes)
    assert {copied.placement(layer, "routed_expert").residency for layer in (1, 2)} == {"copied"}
    assert copied.placement(3, "routed_expert").residency == "mapped"  # an MTP layer, which nobody runs
    experts = sum(copied.placement(layer, "routed_expert").nbytes for layer in (1, 2))
    assert mapped.resident_bytes("mapped") - copied.resident_bytes("mapped") == experts
    assert copied.to_json()["ram_mapped_bytes"] == copied.resident_bytes("mapped") < copied.ram_bytes
    unsplit = plan_for(TINY_CONFIG, replace(budget, residency="locked", nodes=2))
    assert unsplit.nodes == 1 and unsplit.resident_bytes("locked") == experts


def test_norms_and_routers_of_a_checkpoint_become_float32() -> None:
    plan = plan_with(TINY_CONFIG, Budget("cpu", 0, GIB, 256), published)
    router = plan.placement(1, "router")
    assert (router.representation, router.residency, router.nbytes) == ("f32", "copied", 4 * (16 * 256 + 16))
    assert plan.representation(1, "routed_expert") == "fp8_block"
    weight = 128 * 256  # one scale for each of its two blocks
    assert plan.placement(1, "routed_expert").nbytes == 16 * 3 * (weight + 4 * 2)


def test_a_component_whose_tensors_differ_names_both_formats() -> None:
    def available(spec: TensorSpec) -> tuple[str, ...]:
        return ("bf16",) if spec.name.endswith(".wo") else spec.representations[:1]

    plan = plan_with(TINY_CONFIG, Budget("emulate", 2 * GIB, GIB, 256), available)
    assert plan.representation(0, "attention") == "fp8_block+bf16"


@settings(max_examples=25, deadline=None)
@given(
    ragged=st.booleans(),
    device=st.sampled_from(["cuda", "cpu"]),
    recipe=st.sampled_from(sorted(RECIPES)),
    gpu=st.integers(1024, 1150),
    ram=st.integers(1, 160),
    context=st.integers(1, 2560),
)
def test_a_plan_holds_every_tensor_once_within_its_budgets(
    ragged: bool, device: str, recipe: str, gpu: int, ram: int, context: int
) -> None:
    config = parse_config(tiny_config(RAGGED if ragged else {}))
    budget = Budget(device, gpu * 2**20, ram * 2**20, context)  # type: ignore[arg-type]
    try:
        plan = plan_for(config, budget, recipe)
    except PlanError as error:
        assert "short" in str(error) and "--" in str(error)
        return
    assert plan.ram_bytes <= budget.ram and plan.gpu_bytes <= budget.gpu_mem
    keys = [(placement.layer, placement.component, placement.experts) for placement in plan.placements]
    assert len(set(keys)) == len(keys)
    inventory = Inventory.of(config)
    for layer in range(config.n_dense_layers, config.n_layers):
        placed = [expert for p in plan.expert_placements(layer) for expert in range(*(p.experts or ()))]
        assert placed == list(range(config.n_routed_experts))
    assert {layer for layer, *_ in keys} == set(inventory.by_layer)
    least = sum(spec.parameters for spec in inventory.tensors) // 2
    assert plan.weight_bytes("gpu") + plan.weight_bytes("ram") >= least
    assert sum(row.nbytes for row in plan.table()) == plan.gpu_bytes + plan.ram_bytes
    assert 1 <= plan.prefill_chunk <= min(4096, context)


def rank(planning: Planning, plan: Plan) -> tuple[int, int, int]:
    """Where a plan stands in the planner's order; smaller is better. Not made from how the plan was found."""
    exact = {(part.layer, part.component): part.forms[0].representation for part in planning.unpinned}
    components = {p.component for p in plan.placements if p.representation != exact[p.layer, p.component]}
    quality = (plan.cache_format == "int8") + sum(any(c in components for c in step) for step in LADDER)
    ways = [way for way in planning.prefills if way.chunk == plan.prefill_chunk]
    way = next(
        (way for way in ways if way.streams == (plan.streaming is not None)), ways[0]
    )  # or nothing is left in RAM
    return quality, planning.prefills.index(way), -plan.gpu_experts()


MANY_EXPERTS = {"n_routed_experts": 32, "n_group": 4}


@settings(max_examples=25)
@given(
    gpu=st.integers(1026 * 2**10, 1090 * 2**10),
    more_gpu=st.integers(0, 40 * 2**10),
    ram=st.integers(2 * 2**10, 80 * 2**10),
    more_ram=st.integers(0, 60 * 2**10),
    context=st.integers(1, 2560),
)
def test_more_memory_never_makes_a_worse_plan(gpu: int, more_gpu: int, ram: int, more_ram: int, context: int) -> None:
    """Budgets in KiB. Plans are the same each time, and never over budget."""
    config = parse_config(tiny_config(MANY_EXPERTS))
    found = []
    for gpu_mem, host in ((gpu, ram), (gpu + more_gpu, ram + more_ram)):
        budget = Budget("cuda", gpu_mem * 2**10, host * 2**10, context)
        planning = Planning(Inventory.of(config), store_of("balanced", config), budget, MACHINE)
        try:
            plan = make_plan(planning)
        except PlanError:
            found.append((99, 0, 0))
            continue
        assert plan == make_plan(planning)
        assert plan.gpu_bytes <= budget.gpu_mem and plan.ram_bytes <= budget.ram
        found.append(rank(planning, plan))
    assert found[1] <= found[0]


@pytest.mark.parametrize("ram", [330, 345, 384])
def test_more_memory_never_makes_a_worse_plan_of_r1(ram: int) -> None:
    config, ranks = config_of(R1), []
    for gpu in (11, 12, 14, 16, 20, 24, 32, 48, 80):
        planning = Planning(
            Inventory.of(config), store_of("balanced", config), Budget("cuda", gpu * GIB, ram * GIB, 32768), MACHINE
        )
        with suppress(PlanError):
            ranks.append(rank(planning, make_plan(planning)))
    assert ranks and ranks == sorted(ranks, reverse=True)


def test_r1_is_planned_within_a_second() -> None:
    config = config_of(R1)
    inventory, available = Inventory.of(config), store_of("balanced", config)
    for ram in (384, 256):  # one that fits, and one that does not
        begin = time.process_time()
        with suppress(PlanError):
            make_plan(Planning(inventory, available, Budget("cuda", 24 * GIB, ram * GIB, 32768), MACHINE))
        assert time.process_time() - begin < 1


def test_the_most_used_experts_go_to_the_gpu_first() -> None:
    config = parse_config(tiny_config())
    counts = {1: [0] * 16, 2: [1] * 16}
    counts[1][3] = counts[1][4] = counts[1][9] = 100
    counts[2][0] = 50
    everything = plan_for(config, Budget("cuda", 2 * GIB, GIB, 256))
    assert everything.gpu_experts() == 32
    record = everything.expert_placements(1)[0].nbytes // 16
    budget = Budget("cuda", everything.gpu_bytes - 28 * record, GIB, 256)
    usage = Usage(counts)
    plan = make_plan(Planning(Inventory.of(config), store_of("balanced", config), budget, MACHINE, usage=usage))
    on_gpu = {(p.layer, p.experts) for p in plan.placements if p.tier == "gpu" and p.experts}
    assert on_gpu == {(1, (3, 5)), (1, (9, 10)), (2, (0, 1))}
    ranges = [p.experts for p in plan.expert_placements(1)]
    assert ranges == [(0, 3), (3, 5), (5, 9), (9, 10), (10, 16)]
    assert plan.ram_bytes < plan_for(config, replace(budget, device="cpu")).ram_bytes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "not a profile"),
        ("{", "not a profile"),
        ('{"version": 2, "counts": {}}', "not a profile"),
        ('{"version": 1, "counts": {}}', "counts no expert"),
        ('{"version": 1, "counts": {"0": [1]}}', "layer '0'"),
        ('{"version": 1, "counts": {"1": [1, 2]}}', "16 counts"),
        ('{"version": 1, "counts": {"1": [-1]}}', "16 counts"),
    ],
)
def test_profiles_that_are_none(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=words):
        Usage.read(path, Inventory.of(TINY_CONFIG))
    path.write_text('{"version": 1, "counts": {"1": [' + ", ".join(["2"] * 16) + "]}}")
    assert Usage.read(path, Inventory.of(TINY_CONFIG)).of(1) == [2] * 16


def test_pins_are_kept_and_the_rest_is_chosen_around_them() -> None:
    free, pinned = plan_r1(24, 384, 32768), plan_r1(24, 384, 32768, "attention:0-9=accurate", "experts:5/0-15=gpu")
    assert pinned.representation(9, "attention") == "accurate" and pinned.representation(10, "attention") == "q8"
    assert pinned.expert_placements(5)[0].experts == (0, 16) and pinned.expert_placements(5)[0].tier == "gpu"
    assert pinned.gpu_experts() > free.gpu_experts()  # 4 bits make room
    assert plan_r1(24, 384, 32768, "cache=int8", "chunk=256").prefill_chunk == 256
    locked = plan_r1(24, 384, 32768, "experts=mapped", "experts:60=locked")
    assert locked.resident_bytes("locked") == locked.expert_placements(60)[0].nbytes


@pytest.mark.parametrize(
    ("pin", "error", "words"),
    [
        ("experts", UsageError, "not understood"),
        ("experts:5-3=gpu", UsageError, "backwards"),
        ("experts:3=disk", UsageError, "disk"),
        ("attention:1/3=q8", UsageError, "only experts have numbers"),
        ("router=q8", UsageError, "parts are experts"),
        ("chunk=0", UsageError, "not understood"),
        ("cache=int4", UsageError, "not understood"),
        ("experts:0=gpu", PlanError, "no such part"),
        ("experts:61=gpu", PlanError, "no such part"),
        ("experts:3/300=gpu", PlanError, "no such part"),
        ("experts:3=fast", PlanError, "among accurate; routed experts may be gpu"),
        ("attention=gpu", PlanError, "among q8, accurate"),
        ("experts:3/0-9=copied", PlanError, "whole layers"),
        ("experts=gpu", PlanError, "short"),
    ],
)
def test_pins_that_cannot_be(pin: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plan_r1(24, 384, 32768, pin)


def test_experts_on_a_gpu_need_one() -> None:
    with pytest.raises(PlanError, match="this plan has none"):
        plan_for(TINY_CONFIG, Budget("cpu", 0, GIB, 256), "balanced", "experts=gpu")


def test_a_plan_as_json_has_its_sums_and_stays_the_same() -> None:
    budget = Budget("emulate", 2 * GIB, GIB, 256)
    fields = plan_for(TINY_CONFIG, budget).to_json()
    assert fields == plan_for(TINY_CONFIG, budget).to_json()
    assert list(fields)[:3] == ["version", "gpu_bytes", "ram_bytes"] and fields["version"] == PLAN_VERSION
    first = {"layer": None, "component": "embed", "experts": None, "tier": "ram", "residency": "mapped"}
    assert fields["placements"][0].items() >= first.items()


def test_experts_of_two_formats_go_where_others_go() -> None:
    """`accurate` keeps down of the first and the last layer with experts at 8 bits."""
    plan, plain = (
        plan_for(TINY_CONFIG, Budget("cuda", 2 * GIB, GIB, 256), recipe) for recipe in ("accurate", "balanced")
    )
    assert plan.representation(1, "routed_expert") == "accurate+q8" and plan.gpu_experts() == plain.gpu_experts() > 0
    assert plan.placement(1, "routed_expert").nbytes > plain.placement(1, "routed_expert").nbytes
    available, notes = store_of("accurate", TINY_CONFIG), []  # type: ignore[var-annotated]
    assert choose_residency("copied", Inventory.of(TINY_CONFIG), available, [GIB, GIB], notes) == "copied"


def test_records_of_experts_are_whole_pages() -> None:
    for fmt, recipe in ((ACCURATE, "balanced"), (Q8, "q8")):
        plan = plan_for(TINY_CONFIG, Budget("cpu", 0, GIB, 256), recipe)
        record = -(-3 * fmt.block_bytes * 8 * 2 // 4096) * 4096  # 8 tiles of 2 blocks each, three matrices
        assert plan.placement(1, "routed_expert").nbytes == 16 * record


@pytest.mark.parametrize(
    ("hub_id", "total", "routed", "runs"),
    [
        (R1, 671.0, 653.9, True),
        ("moonshotai/Kimi-K2-Instruct", 1026.4, 1014.7, False),
        ("deepseek-ai/DeepSeek-V2", 235.7, 222.7, False),
        ("deepseek-ai/DeepSeek-V2-Lite", 15.7, 14.4, False),
        ("moonshotai/Moonlight-16B-A3B", 16.0, 14.4, True),
    ],
)
def test_known_shapes_have_the_published_numbers_of_parameters(
    hub_id: str, total: float, routed: float, runs: bool
) -> None:
    shape = known_shape(hub_id)
    assert shape is not None and shape.runs == runs and bool(shape.notes) != runs
    inventory = Inventory.of(shape.config)
    billions = {component: inventory.parameters(component) / 1e9 for component in inventory.by_component}
    assert sum(billions.values()) == pytest.approx(total, abs=0.06)
    assert billions["routed_expert"] == pytest.approx(routed, abs=0.06)


def test_v3s_parts_are_those_of_the_paper() -> None:
    inventory = Inventory.of(config_of("deepseek-ai/DeepSeek-V3"))
    assert inventory.parameters("attention") / 1e9 == pytest.approx(11.4, abs=0.05)
    shared = inventory.parameters("shared_expert") + inventory.parameters("dense")
    assert shared / 1e9 == pytest.approx(3.7, abs=0.05)


def test_every_known_model_can_be_planned_and_keeps_its_own_model_type() -> None:
    for fields in {id(fields): fields for fields in KNOWN_MODELS.values()}.values():
        shape = shape_of(fields)
        assert shape.config.model_type == fields["model_type"]
        plan = plan_for(shape.config, Budget("cuda", 48 * GIB, 2048 * GIB, 4096), "balanced", "experts=mapped")
        assert plan.ram_bytes > plan.weight_bytes("ram") > 2 * plan.gpu_bytes // 3


def test_the_context_by_default_and_beyond_the_maximum() -> None:
    notes: list[str] = []
    assert choose_context(None, 163840, notes) == 32768 and not notes
    assert choose_context(None, 8192, notes) == 8192 and "8192" in notes[0]
    for asked in (0, 8193):
        with pytest.raises(ContextError, match=str(asked)):
            choose_context(asked, 8192, [])


@pytest.mark.parametrize(
    ("asked", "gpu_mem", "present", "expected"),
    [
        ("auto", None, None, ("cpu", 0)),
        ("auto", 24, None, ("cuda", 24)),
        ("auto", None, 16, ("cuda", 16)),
        ("cuda", 24, 16, ("cuda", 24)),
        ("cpu", 24, 16, ("cpu", 0)),
        ("emulate", 24, None, ("emulate", 24)),
    ],
)
def test_devices(
    asked: str, gpu_mem: int | None, present: int | None, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = None if present is None else GpuMemory(present, present)
    monkeypatch.setattr(hardware, "gpu_memory", lambda: memory)
    notes: list[str] = []
    assert choose_device(asked, gpu_mem, notes) == expected
    assert len(notes) == (gpu_mem is not None and (asked == "cpu" or present is not None and present < gpu_mem))


def test_devices_that_cannot_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpu_memory", lambda: None)
    for asked in ("cuda", "emulate"):
        with pytest.raises(DeviceError, match="--gpu-mem"):
            choose_device(asked, None, [])
    with pytest.raises(DeviceError, match="'tpu'"):
        choose_device("tpu", None, [])


def test_gpu_memory_is_that_of_the_first_visible_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\nif [ "$4" = 1 ]; then echo "23000, 24564"; else echo "100, 200"; fi\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.gpu_memory() == GpuMemory(100 * 2**20, 200 * 2**20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert hardware.gpu_memory() == GpuMemory(23000 * 2**20, 24564 * 2**20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.gpu_memory() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho 'no devices were found'\n")
    assert hardware.gpu_memory() is None


def test_ram_keeps_a_reserve_and_a_containers_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1073741824\nfile 5\n")
    whole = hardware.usable_ram()
    assert 0 <= whole < hardware.psutil.virtual_memory().total - hardware.RAM_RESERVE
    (tmp_path / "memory.max").write_text(str(4 * GIB))
    reserve = 2 * GIB + 0.02 * hardware.psutil.virtual_memory().total
    available = min(3 * GIB, hardware.psutil.virtual_memory().available)
    assert hardware.usable_ram() == int(available - min(reserve, available / 2))
    (tmp_path / "memory.max").write_text(str(GIB + 2**20))
    assert hardware.usable_ram() == 2**19  # a small container: half of what is left


def test_planning_imports_neither_torch_nor_numba() -> None:
    code = (
        "import sys, cli.plan, offload.planner, offload.hardware, quant.hub, quant.shapes\n"
        "heavy = {'torch', 'numba', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""The planner: known figures of R1, what fits where, and what is said if nothing does."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import hardware
from offload.hardware import GpuMemory, choose_device
from offload.plan import PLAN_VERSION, Plan, PlanError
from offload.planner import Budget, choose_context, choose_residency, make_plan
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


def config_of(hub_id: str) -> ModelConfig:
    shape = known_shape(hub_id)
    assert shape is not None
    return shape.config


def plan_for(config: ModelConfig, budget: Budget, recipe: str = "balanced") -> Plan:
    return make_plan(Inventory.of(config), lambda spec: representations(spec, RECIPES[recipe].of(config)), budget)


def plan_r1(gpu: float, ram: float, context: int, device: str = "cuda", recipe: str = "balanced") -> Plan:
    return plan_for(config_of(R1), Budget(device, int(gpu * GIB), int(ram * GIB), context), recipe)  # type: ignore[arg-type]


def of_component(plan: Plan, component: str) -> float:
    """GiB of a component in the model proper."""
    placements = [p for p in plan.placements if p.component == component and (p.layer or 0) < plan.n_layers]
    return sum(p.nbytes for p in placements) / GIB


def formats(plan: Plan) -> dict[str, str]:
    layers = {"dense": 0, "shared_expert": 5, "attention": 5, "kv_b": 5, "head": None}
    return {component: plan.representation(layer, component) for component, layer in layers.items()}  # type: ignore[arg-type]


def test_r1_on_24_gib_is_as_exact_as_the_store() -> None:
    plan = plan_r1(24, 384, 32768)
    assert set(formats(plan).values()) == {"q8"}
    assert of_component(plan, "routed_expert") == pytest.approx(342.6, abs=0.05)
    assert of_component(plan, "attention") + of_component(plan, "kv_b") == pytest.approx(
        11.413e9 * 8.25 / 8 / GIB, rel=2e-3
    )
    assert of_component(plan, "shared_expert") + of_component(plan, "dense") == pytest.approx(
        3.743e9 * 8.25 / 8 / GIB, rel=2e-3
    )
    assert of_component(plan, "router") + of_component(plan, "norm") == pytest.approx(0.4, abs=0.01)
    assert plan.cache_bytes / GIB == pytest.approx(2.14, abs=0.01)
    assert plan.decode_ram_bytes == pytest.approx(11.5e9, rel=0.01)
    assert plan.prefill_chunk == 512 and plan.reserve_bytes == 0.75 * GIB
    assert 0.4 < plan.workspace_bytes / GIB < 0.8
    assert 353 < plan.ram_bytes / GIB < 354  # 342.6 experts, 1.7 embedding, 8.8 MTP layer, buffers


def test_the_ladder_goes_down_in_order_and_no_further_than_needed() -> None:
    steps = [("dense", "shared_expert"), ("attention",), ("kv_b",), ("head",)]
    expected: dict[str, str] = dict.fromkeys(formats(plan_r1(24, 384, 32768)), "q8")
    seen = [expected]
    for components in steps:
        expected = expected | dict.fromkeys(components, "accurate")
        seen.append(expected)
    found = []
    gpu, plan = 24.0, plan_r1(24, 384, 32768)
    while True:
        if not found or formats(plan) != found[-1]:
            found.append(formats(plan))
        gpu = plan.gpu_bytes / GIB - 1e-6  # a KiB less than this plan needs
        try:
            plan = plan_r1(gpu, 384, 32768)
        except PlanError:
            break
        assert plan.gpu_bytes <= gpu * GIB
    assert found == seen
    assert plan.prefill_chunk < 512  # tried last of all


def test_long_contexts_and_small_gpus_take_4_bits() -> None:
    assert formats(plan_r1(24, 384, 131072)) == formats(plan_r1(20, 384, 131072)) != formats(plan_r1(27, 384, 131072))
    assert formats(plan_r1(16, 384, 8192))["attention"] == "accurate"
    assert plan_r1(16, 384, 8192).gpu_bytes <= 16 * GIB
    twelve = plan_r1(12, 384, 4096)
    assert twelve.gpu_bytes <= 12 * GIB and formats(twelve)["attention"] == "accurate"


def test_what_r1_lacks_is_said_with_what_would_do() -> None:
    with pytest.raises(PlanError) as error:
        plan_r1(24, 256, 32768)
    [short] = re.findall(r"([\d.]+) GiB short", str(error.value))
    assert float(short) == pytest.approx(97, abs=1)
    [needed] = re.findall(r"--ram (\d+)G", str(error.value))
    assert plan_r1(24, int(needed), 32768).ram_bytes <= int(needed) * GIB
    with pytest.raises(PlanError):
        plan_r1(24, int(needed) - 1, 32768)


@pytest.mark.parametrize("gpu", [12, 16])
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
    assert re.search(r"it needs --gpu-mem \d+G and --ram \d+G$", message)


def test_a_published_checkpoint_that_is_too_large_points_to_quantize() -> None:
    inventory = Inventory.of(config_of(R1))
    budget = Budget("cuda", 24 * GIB, 384 * GIB, 32768)
    with pytest.raises(PlanError, match="the 4-bit store that `dsr1 quantize` makes of the published checkpoint fits"):
        make_plan(inventory, lambda spec: spec.representations[:1], budget)
    with pytest.raises(PlanError, match="needs --gpu-mem") as error:
        make_plan(inventory, lambda spec: spec.representations[:1], replace(budget, gpu_mem=GIB))
    assert "quantize" not in str(error.value)


def test_tiers_and_residency_with_a_gpu() -> None:
    plan = plan_for(TINY_CONFIG, Budget("emulate", GIB, GIB, 256))
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


def choose(asked: str | None, nodes: list[int], published: bool = False) -> tuple[str, list[str]]:
    """The residency of the tiny model's experts, and the notes."""
    notes: list[str] = []

    def available(spec: TensorSpec) -> tuple[str, ...]:
        return spec.representations[:1] if published else representations(spec, RECIPES["balanced"].of(TINY_CONFIG))

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
    assert choose(None, [GIB, GIB], published=True) == choose("mapped", [GIB], published=True) == ("mapped", [])
    with pytest.raises(PlanError, match="only a store's experts can be copied.*fp8_block"):
        choose("copied", [GIB], published=True)


@pytest.mark.parametrize("device", ["cpu", "emulate"])
def test_a_plan_has_the_experts_where_they_shall_be(device: str) -> None:
    mapped = plan_for(TINY_CONFIG, Budget(device, GIB, GIB, 256))  # type: ignore[arg-type]
    copied = plan_for(TINY_CONFIG, Budget(device, GIB, GIB, 256, residency="copied", nodes=2))  # type: ignore[arg-type]
    assert (mapped.nodes, copied.nodes, copied.ram_bytes) == (1, 2, mapped.ram_bytes)
    assert {copied.placement(layer, "routed_expert").residency for layer in (1, 2)} == {"copied"}
    assert copied.placement(3, "routed_expert").residency == "mapped"  # an MTP layer, which nobody runs
    experts = sum(copied.placement(layer, "routed_expert").nbytes for layer in (1, 2))
    assert mapped.resident_bytes("mapped") - copied.resident_bytes("mapped") == experts
    assert copied.to_json()["ram_mapped_bytes"] == copied.resident_bytes("mapped") < copied.ram_bytes
    unsplit = plan_for(TINY_CONFIG, Budget(device, GIB, GIB, 256, residency="locked", nodes=2))  # type: ignore[arg-type]
    assert unsplit.nodes == 1 and unsplit.resident_bytes("locked") == experts


def test_norms_and_routers_of_a_checkpoint_become_float32() -> None:
    inventory = Inventory.of(TINY_CONFIG)
    plan = make_plan(inventory, lambda spec: spec.representations[:1], Budget("cpu", 0, GIB, 256))
    router = plan.placement(1, "router")
    assert (router.representation, router.residency, router.nbytes) == ("f32", "copied", 4 * (16 * 256 + 16))
    assert plan.representation(1, "routed_expert") == "fp8_block"
    weight = 128 * 256  # one scale for each of its two blocks
    assert plan.placement(1, "routed_expert").nbytes == 16 * 3 * (weight + 4 * 2)


def test_a_component_whose_tensors_differ_names_both_formats() -> None:
    def available(spec: TensorSpec) -> tuple[str, ...]:
        return ("bf16",) if spec.name.endswith(".wo") else spec.representations[:1]

    plan = make_plan(Inventory.of(TINY_CONFIG), available, Budget("emulate", GIB, GIB, 256))
    assert plan.representation(0, "attention") == "fp8_block+bf16"


@settings(max_examples=25, deadline=None)
@given(
    ragged=st.booleans(),
    device=st.sampled_from(["cuda", "cpu"]),
    recipe=st.sampled_from(sorted(RECIPES)),
    gpu=st.integers(768, 900),
    ram=st.integers(1, 60),
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
    keys = [(placement.layer, placement.component) for placement in plan.placements]
    assert len(set(keys)) == len(keys)
    inventory = Inventory.of(config)
    assert {layer for layer, _ in keys} == set(inventory.by_layer)
    least = sum(spec.parameters for spec in inventory.tensors) // 2
    assert plan.weight_bytes("gpu") + plan.weight_bytes("ram") >= least
    assert sum(row.nbytes for row in plan.table()) == plan.gpu_bytes + plan.ram_bytes
    assert 1 <= plan.prefill_chunk <= min(512, context)


def test_a_plan_as_json_has_its_sums_and_stays_the_same() -> None:
    budget = Budget("emulate", GIB, GIB, 256)
    fields = plan_for(TINY_CONFIG, budget).to_json()
    assert fields == plan_for(TINY_CONFIG, budget).to_json()
    assert list(fields)[:3] == ["version", "gpu_bytes", "ram_bytes"] and fields["version"] == PLAN_VERSION
    first = {"layer": None, "component": "embed", "experts": None, "tier": "ram", "residency": "mapped"}
    assert fields["placements"][0].items() >= first.items()


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
        plan = plan_for(shape.config, Budget("cuda", 48 * GIB, 2048 * GIB, 4096))
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

"""The cost model on machines of round figures, and machines' files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from offload.costs import Costs, block_bytes, with_waiting
from offload.machine import Machine, MachineGpu, block_ns, load_machine, mean_of, named_machines
from offload.parts import Budget
from offload.pins import parse_pins
from offload.plan import Plan
from offload.planner import Planning, make_plan
from offload.this_machine import keep, machine_for, measured_machine
from quant.errors import Dsr1Error
from quant.inventory import Inventory
from quant.packed import ACCURATE, PACKED_FORMATS, Q8, ExpertRecord
from quant.recipes import RECIPES
from quant.shapes import known_shape
from quant.store_formats import representations

GIB = 2**30
GPU = MachineGpu("a GPU", 24 * GIB, 1e12, 100e12, 20e9, 20e9)
MACHINE = Machine(
    name="round figures",
    source="made up",
    date="",
    cores=10,
    isa="amx",
    nodes=1,
    ram=512 * GIB,
    read_bytes_s=100e9,
    experts={"accurate": ((1, 100.0), (3, 200.0), (5, 600.0)), "q8": ((1, 200.0),)},
    matrices={"q8": ((1, 200.0),), "f32": ((1, 900.0),)},
    expert_output_ns=0.5,
    matrix_output_ns=0.25,
    experts_s=5e-6,
    matrix_s=3e-6,
    call_s=1e-6,
    eager_s=2e-5,
    value_ns=1.0,
    heads_ns=300.0,
    absorbed_ns=0.1,
    decompressed_ns=0.1,
    gpu=GPU,
)
RESULTS_S = 8 * (2 * 2048 + 7168) * 0.5e-9 / 10  # of eight experts of R1's size, for a token
R1 = known_shape("deepseek-ai/DeepSeek-R1")
assert R1 is not None
CONFIG = R1.config


def planned(device: str, *pins: str, recipe: str = "balanced") -> Plan:
    formats = RECIPES[recipe].of(CONFIG)

    def available(spec):  # type: ignore[no-untyped-def]
        return representations(spec, formats)

    budget = Budget(device, 24 * GIB, 512 * GIB, 8192)  # type: ignore[arg-type]
    return make_plan(Planning(Inventory.of(CONFIG), available, budget, MACHINE, parse_pins(pins)))


def test_times_of_a_block_lie_on_straight_lines() -> None:
    times = [block_ns(MACHINE.experts["accurate"], tokens) for tokens in (0.5, 1, 2, 3, 4, 5, 10)]
    assert times == [100, 100, 150, 200, 400, 600, 1600]  # beyond the last point along the last line
    assert [block_ns(MACHINE.experts["q8"], tokens) for tokens in (1, 4)] == [200, 800]  # with one point, in proportion


def test_a_layer_s_experts_by_hand() -> None:
    """Eight experts of 3 x 2048 x 7168 values, 21504 blocks each, at 100 ns on ten cores: 1.72 ms."""
    costs, record = Costs(CONFIG, MACHINE), 21504 * block_bytes("accurate")
    seconds = 8 * 21504 * 100e-9 / 10 + RESULTS_S + 5e-6
    assert costs.experts("accurate", record, 8, 8).seconds == pytest.approx(seconds)
    assert costs.experts_alone("accurate", record, 8, 8).seconds == pytest.approx(seconds + 3 * 20e-6)
    assert costs.experts("accurate", record, 8, 8).limit == "reading weights from RAM"
    assert costs.experts("accurate", record, 8, 80).limit == "the processor's arithmetic"


def test_an_expert_of_two_formats_by_hand() -> None:
    """Two of three matrices are `accurate`, 100 ns a block, and the third is q8, 200 ns."""
    record = ExpertRecord(ACCURATE, CONFIG.dim, CONFIG.moe_inter_dim, Q8)
    times = Costs(CONFIG, MACHINE).experts(record.format_name, record.nbytes, 8, 8)
    assert times.seconds == pytest.approx(8 * 7168 * (100 + 100 + 200) * 1e-9 / 10 + RESULTS_S + 5e-6)
    decode = [
        Costs(CONFIG, MACHINE).predict(planned("cpu", recipe=recipe)).decode_tok_s
        for recipe in ("accurate", "balanced")
    ]
    assert decode[0] < decode[1]


def test_slower_memory_makes_each_block_wait_longer() -> None:
    assert block_bytes("accurate") == 1152
    slow = with_waiting(MACHINE, 0.1)
    assert [ns for _, ns in slow.experts["accurate"]] == pytest.approx([215.2, 315.2, 715.2])
    assert slow.matrices["f32"][0][1] == pytest.approx(900 + 819.2)
    assert with_waiting(MACHINE, 0.0) == MACHINE
    fast = with_waiting(MACHINE, -1.0)
    assert fast.experts["accurate"][0][1] == pytest.approx(50)  # no block is read in no time


def test_two_measurements_make_one_machine() -> None:
    other = replace(MACHINE, read_bytes_s=50e9, call_s=3e-6, experts=MACHINE.matrices, matrices=MACHINE.matrices)
    with pytest.raises(KeyError):
        mean_of(MACHINE, other)
    other = replace(other, experts={"accurate": ((1, 200.0), (3, 200.0), (5, 800.0)), "q8": ((1, 400.0),)}, date="x")
    mean = mean_of(MACHINE, other)
    assert (mean.read_bytes_s, mean.call_s, mean.date) == (75e9, 2e-6, "x")
    assert mean.experts == {"accurate": ((1, 150.0), (3, 200.0), (5, 700.0)), "q8": ((1, 300.0),)}
    assert mean.matrices == MACHINE.matrices and mean_of(mean, mean) == mean


def test_decoding_on_the_cpu_by_hand() -> None:
    """Of one layer of R1's attention, all its parts."""
    plan = planned("cpu", "chunk=512")
    costs = Costs(CONFIG, MACHINE)
    kv_b = plan.placement(5, "kv_b")
    blocks = 128 * 256 * 512 / 2048
    work = 128 * (4096 * (512 + 576) + 256 * 512)
    attention = costs._attention(plan, kv_b, 1, 4096).seconds
    assert attention == pytest.approx((300 * blocks + 0.1 * work) * 1e-9 / 10)
    several = costs._attention(plan, kv_b, 512, 1024)
    pairs = 512 * 1024 - 512 * 512 / 2
    made = 2 * blocks * 512 * 200e-9 / 10 + 1024 * 128 * 256 * 0.25e-9 / 10  # q8, two blocks of 512 latents
    assert several.seconds == pytest.approx(0.1 * 128 * pairs * (192 + 128) * 1e-9 / 10 + made)


def test_decoding_by_hand() -> None:
    """On a GPU: all experts in RAM, 58 layers of 1.72 ms, and 16 GiB of weights at 0.75 TB/s: about 23 ms."""
    plan = planned("cuda", "experts=mapped", "chunk=512")
    prediction = Costs(CONFIG, MACHINE).predict(plan, prompt=512, position=0)
    experts = 58 * (8 * 21504 * 100e-9 / 10 + RESULTS_S + 35e-6 + (8 * 7168 + 96) / 20e9)
    shared = plan.placement(5, "shared_expert").nbytes * 58
    gpu = (plan.weight_bytes("gpu") - shared) / 0.75e12 + 61 * 25 * 3e-6
    assert 1 / prediction.decode_tok_s == pytest.approx(experts + gpu, rel=0.01)
    assert prediction.decode_limit == "reading weights from RAM"


def test_experts_on_the_gpu_and_faster_machines_help() -> None:
    some, none = planned("cuda", "chunk=512"), planned("cuda", "experts=mapped", "chunk=512")
    assert some.gpu_experts() > 100
    costs = Costs(CONFIG, MACHINE)
    assert costs.predict(some).decode_tok_s > costs.predict(none).decode_tok_s
    cpu = planned("cpu")
    slow, fast = (Costs(CONFIG, replace(MACHINE, cores=cores)).predict(cpu) for cores in (10, 20))
    assert 1.5 < fast.decode_tok_s / slow.decode_tok_s <= 2
    assert costs.prefill_tok_s(planned("cpu", "chunk=2048")) > costs.prefill_tok_s(planned("cpu", "chunk=256"))


@pytest.mark.parametrize("name", named_machines())
def test_shipped_machines_are_whole(name: str) -> None:
    machine = load_machine(name)
    assert set(machine.experts) == set(PACKED_FORMATS) and machine.gpu is not None
    per_core = machine.read_bytes_s / machine.cores
    for fmt, points in machine.experts.items():  # no faster than reading
        assert block_ns(points, 1) >= 1e9 * block_bytes(fmt) / per_core
    assert Machine.from_fields(json.loads(machine.to_json()), name) == machine


def test_shipped_machines_are_those_that_the_tool_makes() -> None:
    from tools.machines.__main__ import SHEETS, machine_of

    assert {sheet.name for sheet in SHEETS} == set(named_machines())
    for sheet in SHEETS:
        assert load_machine(sheet.name) == machine_of(sheet)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 1}, "version 2"),
        ({"cores": 0}, "cores is 0"),
        ({"cores": True}, "cores is True"),
        ({"read_bytes_s": 1e999}, "read_bytes_s"),
        ({"color": "red"}, "'color'"),
        ({"name": 5}, "name must be a text"),
        ({"experts": {}}, "experts"),
        ({"experts": {"q8": [[4, 1.0], [2, 1.0]]}}, "ascending"),
        ({"matrices": {"q8": [[1]]}}, "pairs"),
        ({"gpu": 3}, "must be an object"),
        ({"gpu": {"name": "x"}}, "no field"),
    ],
)
def test_files_that_describe_no_machine(change: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(json.loads(MACHINE.to_json()) | change))
    with pytest.raises(Dsr1Error, match=words) as error:
        load_machine(str(path))
    assert "\n" not in str(error.value)


def test_what_was_measured_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("offload.this_machine.user_cache", lambda: tmp_path)
    assert measured_machine() is None and "not measured" in machine_for(None).source
    path = keep(replace(MACHINE, date="2026-01-01", gpu=None))
    assert measured_machine() == replace(MACHINE, date="2026-01-01", gpu=None)
    assert machine_for(None).gpu is not None  # there is always one to plan for
    path.write_text("damaged")
    assert measured_machine() is None

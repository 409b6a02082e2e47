"""Experts that are streamed to the GPU: when a plan does so, what that takes, and that numbers stay the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_rt import Engine
from hybrid_rt.moe import MoE
from offload.backend import CpuBackend
from offload.costs import Costs
from offload.device_experts import SplitExperts
from offload.experts import CpuExperts, ExpertBuffers
from offload.machine import Machine, load_machine
from offload.node_experts import NodeExperts, split_records
from offload.parts import Budget
from offload.pins import parse_pins
from offload.plan import SLICE_EXPERTS, Plan, PlanError, Streaming
from offload.plan_file import read_plan, save_plan
from offload.planner import Planning, make_plan
from offload.streamed_experts import HostExperts, Staging, StreamedExperts
from quant.errors import UsageError
from quant.inventory import Inventory
from quant.packed import ACCURATE
from quant.recipes import RECIPES
from quant.shapes import known_shape
from quant.store_formats import representations
from tests.test_experts import CONFIG, DIM, EXPERTS, make_records, route

pytestmark = pytest.mark.usefixtures("one_thread")
GIB = 2**30
R1 = "deepseek-ai/DeepSeek-R1"
HOW = {"device": "emulate", "gpu_mem": "3G", "threads": 1, "dtype": "float32", "context": 512}


def planning_of_r1(machine: Machine, *pins: str, gpu: int = 24, ram: int = 400) -> Planning:
    shape = known_shape(R1)
    assert shape is not None
    formats = RECIPES["balanced"].of(shape.config)
    budget = Budget("cuda", gpu * GIB, ram * GIB, 32768)
    available = lambda spec: representations(spec, formats)  # noqa: E731
    return Planning(Inventory.of(shape.config), available, budget, machine, parse_pins(pins))


def with_link(machine: Machine, to_gpu: float) -> Machine:
    assert machine.gpu is not None
    return replace(machine, gpu=replace(machine.gpu, to_gpu_bytes_s=to_gpu))


DESKTOP = load_machine("rtx-4090-ddr5")


def test_a_desktop_streams_long_passes_by_hand() -> None:
    """R1's layer: 5.91 GiB. By hand: through PCIe at 25 GB/s 0.25 s, and no more than memory, which moves it thrice."""
    planning = planning_of_r1(DESKTOP)
    plan = make_plan(planning)
    assert plan.streaming is not None and plan.streaming.slice_experts == SLICE_EXPERTS <= 16
    assert plan.streaming.staging_bytes == 2 * 8 * 3 * 7168 * 2048 * 36 // 64  # 4.5 bits a weight, two slices
    assert plan.streaming.from_tokens <= plan.prefill_chunk and plan.streams(plan.prefill_chunk)
    assert not plan.streams(plan.streaming.from_tokens - 1) and not plan.streams(1)
    whole = make_plan(planning_of_r1(DESKTOP, "experts=mapped"))
    assert whole.streaming is not None and whole.streaming.bytes_a_pass == 58 * 256 * 3 * 7168 * 2048 * 36 // 64
    costs, streaming = planning.costs, whole.streaming
    link, memory = 6.342e9 / DESKTOP.gpu.to_gpu_bytes_s, 3 * 6.342e9 / DESKTOP.read_bytes_s  # type: ignore[union-attr]
    found = costs.layer_experts_s(whole, streaming, 512)
    assert max(link, memory) < found < 1.1 * max(link, memory)
    for tokens, streams in ((64, False), (streaming.from_tokens, True)):
        assert (costs.layer_experts_s(whole, streaming, tokens) < costs.layer_experts_s(whole, None, tokens)) == streams


def test_a_plan_with_streaming_is_predicted_faster_and_says_so() -> None:
    plan, plain = make_plan(planning_of_r1(DESKTOP)), make_plan(planning_of_r1(DESKTOP, "stream=off"))
    speeds = [Costs(planning_of_r1(DESKTOP).config, DESKTOP).prefill_tok_s(each) for each in (plan, plain)]
    assert speeds[0] > 1.05 * speeds[1] and plain.streaming is None
    assert any("tokens a pass on, the GPU computes also the experts that are in RAM" in why for why in plan.reasons)
    assert any("never streamed to the GPU, as --pin says" in why for why in plain.reasons)
    assert plan.gpu_bytes <= plan.gpu_budget and plan.ram_bytes <= plan.ram_budget
    parts = plan.weight_bytes("gpu") + plan.cache_bytes + plan.workspace_bytes + plan.reserve_bytes
    assert plan.gpu_bytes == parts + plan.staging_bytes
    assert plan.ram_bytes == plan.weight_bytes("ram") + plan.host_bytes + plan.staging_bytes
    assert sum(row.part.startswith("staging") for row in plan.table()) == 2


def test_a_slow_link_or_a_fast_processor_streams_nothing() -> None:
    slow = make_plan(planning_of_r1(with_link(DESKTOP, 1e9)))
    assert slow.streaming is None and any("because that is slower" in why for why in slow.reasons)
    assert make_plan(planning_of_r1(load_machine("xeon-6454s-x2"))).streaming is None
    fast = planning_of_r1(with_link(DESKTOP, 50e9))
    assert fast.costs.stream_from(make_plan(fast), 8) <= planning_of_r1(DESKTOP).costs.stream_from(  # type: ignore[operator]
        make_plan(fast), 8
    )


def test_pins_decide_and_are_checked() -> None:
    plan = make_plan(planning_of_r1(load_machine("xeon-6454s-x2"), "stream=100", "chunk=512"))
    assert plan.streaming is not None and plan.streaming.from_tokens == 100
    with pytest.raises(UsageError, match="only passes of 64 tokens and more can stream"):
        parse_pins(["stream=63"])
    with pytest.raises(UsageError, match="stream=off"):
        parse_pins(["stream=on"])
    with pytest.raises(PlanError, match="only a store's experts in RAM can be streamed"):
        Engine.load("nano-r1", device="cpu", pins=["stream=64"])
    with pytest.raises(PlanError, match="only a store's experts in RAM can be streamed"):
        Engine.load("nano-r1-fp8", device="emulate", gpu_mem="3G", pins=["stream=64"])


def prompt(count: int) -> list[int]:
    return torch.randint(0, 400, (count,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def computed() -> Tensor:
    """Logits of a prompt whose experts the CPU computes."""
    return Engine.load("nano-r1", pins=["experts=mapped", "stream=off", "chunk=128"], **HOW).logits(prompt(200))


@pytest.mark.parametrize(
    "pins",
    [
        ["experts=mapped"],
        ["experts=copied"],
        ["experts=mapped", "experts:1/0-5=gpu", "experts:2/3-20=gpu", "experts:3/31=gpu"],
    ],
    ids=["mapped", "copied", "some on the GPU"],
)
def test_streamed_passes_give_the_same_numbers(pins: list[str], computed: Tensor) -> None:
    """Up to the order of sums; the last 72 tokens are below the limit of 80 and computed by the CPU."""
    engine = Engine.load("nano-r1", pins=[*pins, "stream=80", "chunk=128"], **HOW)
    assert engine.plan.host_tokens == engine.buffers.max_tokens == 80 and engine.prefill_chunk == 128
    experts = [block.ffn.experts for block in engine.transformer.layers if isinstance(block.ffn, MoE)]
    hosts = [each.host if isinstance(each, SplitExperts) else each for each in experts]
    assert all(isinstance(host, HostExperts) for host in hosts)
    found = engine.logits(prompt(200))
    assert (found - computed).abs().max() < 1e-3 * computed.abs().max()
    assert torch.equal(engine.logits(prompt(200)), found)
    assert engine.backend.ledger.peak <= engine.plan.gpu_bytes - engine.plan.reserve_bytes  # type: ignore[attr-defined]


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_slices_are_gathered_from_every_kind_of_memory(nodes: int) -> None:
    """Experts of one pass: from copies that several NUMA nodes share, some ranges only, and -1 for those elsewhere."""
    torch.manual_seed(0)
    backend, packed = CpuBackend(), make_records(ACCURATE)
    parts = []
    for share in split_records(packed.record, nodes):
        part = torch.zeros(EXPERTS, share.nbytes, dtype=torch.uint8)
        for piece in share.pieces:
            source = packed.records[:, piece.begin : piece.begin + piece.nbytes]
            part[:, piece.place : piece.place + piece.nbytes] = source
        parts.append(part)
    staging = Staging(backend, packed.record.nbytes + 4096, EXPERTS, size=3)
    ranges = [(0, 1), (2, 9), (11, EXPERTS)]
    there = [expert for first, end in ranges for expert in range(first, end)]
    x, (ids, weights) = torch.randn(9, DIM), route(9)
    ids = torch.where(torch.isin(ids, torch.tensor(there)), ids, -1)
    assert (ids < 0).any()
    cpu = CpuExperts(packed, backend, ExpertBuffers(CONFIG, backend, 9))
    expected = cpu.sync(cpu.submit(x, ids, weights))
    for held in (packed, NodeExperts(tuple(parts), packed.record)):
        layer = StreamedExperts(held, ranges, staging)
        assert [count for _, count in layer.slices] == [
            1,
            3,
            3,
            1,
            *([3] * ((EXPERTS - 11) // 3)),
            (EXPERTS - 11) % 3 or 3,
        ][: len(layer.slices)]
        found = layer.sync(layer.submit(x, ids, weights))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_saved_plans_keep_it_and_count_anew(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = Engine.load("nano-r1", pins=["experts=mapped", "stream=80", "chunk=128"], **HOW).plan
    save_plan(plan, path)
    fields = json.loads(path.read_text())
    assert fields["streaming"]["from_tokens"] == 80
    fields["streaming"]["staging_bytes"] = 1
    path.write_text(json.dumps(fields))
    assert read_plan(path).fields["streaming"]["staging_bytes"] == 1
    again = Engine.load("nano-r1", plan=path, threads=1, dtype="float32").plan
    assert again.streaming == plan.streaming and again.gpu_bytes == plan.gpu_bytes
    off = Engine.load("nano-r1", plan=path, threads=1, dtype="float32", pins=["stream=off"]).plan
    assert off.streaming is None and off.host_tokens == 128


def test_transfers_of_a_pass() -> None:
    plan: Plan = make_plan(planning_of_r1(DESKTOP, "experts=mapped", "stream=512", "chunk=1024"))
    assert plan.transfers is not None and plan.streaming == Streaming(
        512,
        SLICE_EXPERTS,
        plan.streaming.staging_bytes,
        plan.streaming.bytes_a_pass,  # type: ignore[union-attr]
    )
    embedded, logits = 2 * 7168, 4 * 129280
    assert plan.crossing_bytes(512) == 512 * embedded + plan.streaming.bytes_a_pass + logits
    assert plan.crossing_bytes(511) == 511 * (embedded + 58 * (8 * 7168 + 12 * 8)) + logits
    assert plan.crossing_bytes(1) == plan.transfers.decode

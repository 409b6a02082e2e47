"""Plans of full-size models against the model's own code on fake tensors: devices, bytes at their most, transfers.

A pass goes through all layers at 4k of context, and through the first ones at 32k and 128k, whose temporaries are those
of all others; the slow test goes through all.
"""

import pytest
import torch

from hybrid_rt.proof import Proof, Prover
from offload.machine import load_machine
from offload.parts import Budget
from offload.pins import parse_pins
from offload.plan import Plan
from offload.planner import Planning, make_plan
from quant.inventory import Inventory
from quant.recipes import RECIPES
from quant.shapes import known_shape
from quant.store_formats import representations

GIB = 2**30
R1, V3, MOONLIGHT = "deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3", "moonshotai/Moonlight-16B-A3B"
MACHINE = load_machine("rtx-4090-ddr5")
FEW = 5  # layers: R1's three dense ones, one with experts on both sides, one with experts in RAM


def prover(hub_id: str, gpu: int, ram: int, context: int, *pins: str, recipe: str = "balanced") -> Prover:
    shape = known_shape(hub_id)
    assert shape is not None
    inventory, budget = Inventory.of(shape.config), Budget("cuda", gpu * GIB, ram * GIB, context)
    formats = RECIPES[recipe].of(shape.config)
    planning = Planning(inventory, lambda spec: representations(spec, formats), budget, MACHINE, parse_pins(pins))
    return Prover(make_plan(planning), inventory, formats)


def check(plan: Plan, proofs: list[Proof]) -> None:
    """Within the budget, and within 2 % of what the plan says of each part and of the whole."""
    peak = max(proof.gpu_bytes for proof in proofs)
    workspace = max(proof.workspace_bytes for proof in proofs)
    print(f"{plan.gpu_bytes} planned, {peak} taken; workspace {plan.workspace_bytes} planned, {workspace} taken")
    assert peak <= plan.gpu_budget
    assert peak <= plan.gpu_bytes <= 1.02 * peak
    assert workspace <= plan.workspace_bytes
    assert {(proof.cache_bytes, proof.staging_bytes) for proof in proofs} == {(plan.cache_bytes, plan.staging_bytes)}
    assert proofs[0].weight_bytes == pytest.approx(plan.weight_bytes("gpu"), rel=1e-4)


def check_transfers(plan: Plan, proof: Proof, tokens: int) -> None:
    """Of a pass through all layers."""
    assert plan.transfers is not None
    assert proof.crossing_bytes == plan.crossing_bytes(tokens)
    if tokens == 1:
        print(f"{proof.crossing_bytes} bytes a token over PCIe")
        assert proof.crossing_bytes == plan.transfers.decode


def test_r1_at_4k_through_all_layers() -> None:
    proving = prover(R1, 24, 384, 4096)
    chunk = proving.plan.prefill_chunk
    decode, prefill = proving.run(1, 4095), proving.run(chunk, 4096 - chunk)
    check(proving.plan, [decode, prefill])
    check_transfers(proving.plan, decode, 1)
    check_transfers(proving.plan, prefill, chunk)
    few = proving.run(chunk, 4096 - chunk, layers=FEW)
    assert few.workspace_bytes == prefill.workspace_bytes


@pytest.mark.parametrize(
    ("hub_id", "gpu", "ram", "context"),
    [
        (R1, 24, 384, 32768),
        (R1, 24, 384, 131072),
        (R1, 16, 384, 8192),
        (R1, 12, 384, 4096),
        (R1, 80, 512, 32768),
        (V3, 24, 384, 32768),
        (MOONLIGHT, 24, 32, 4096),
        (MOONLIGHT, 6, 32, 8192),
    ],
)
def test_what_a_plan_says_is_what_its_passes_take(hub_id: str, gpu: int, ram: int, context: int) -> None:
    proving = prover(hub_id, gpu, ram, context)
    chunk = proving.plan.prefill_chunk
    check(proving.plan, [proving.run(1, context - 1, FEW), proving.run(chunk, context - chunk, FEW)])


@pytest.mark.slow
@pytest.mark.parametrize(("hub_id", "context"), [(R1, 32768), (R1, 131072), (V3, 131072), (MOONLIGHT, 8192)])
def test_all_layers_at_long_contexts(hub_id: str, context: int) -> None:
    proving = prover(hub_id, 24, 384, context)
    chunk = proving.plan.prefill_chunk
    decode, prefill = proving.run(1, context - 1), proving.run(chunk, context - chunk)
    check(proving.plan, [decode, prefill])
    check_transfers(proving.plan, decode, 1)
    check_transfers(proving.plan, prefill, chunk)


def test_a_plan_with_experts_of_two_formats() -> None:
    """R1's first three layers with experts have down at 8 bits, and so have experts on the GPU."""
    proving = prover(R1, 24, 400, 4096, recipe="accurate")
    assert proving.plan.gpu_experts() and proving.plan.representation(3, "routed_expert") == "accurate+q8"
    chunk = proving.plan.prefill_chunk
    check(proving.plan, [proving.run(1, 4095, FEW), proving.run(chunk, 4096 - chunk, FEW)])


def test_operators_across_devices_are_refused() -> None:
    proving = prover(MOONLIGHT, 24, 32, 256)
    proving.model.rope.frequencies = torch.zeros_like(proving.model.rope.frequencies, device="cpu")
    with pytest.raises(RuntimeError, match="device"):
        proving.run(1, 0)

"""Deferred experts: which they are, where their sum joins, and that prompts know nothing of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cli.main import app
from hybrid_rt import Engine, Sampling
from hybrid_rt.latent_file import engine_identity
from hybrid_rt.moe import MoE
from offload.backend import Backend, CpuBackend
from offload.deferral import NO_DEFERRAL, Deferral, deferral_of
from offload.emulate import EmulatedBackend, Ledger
from offload.experts import CpuExperts, ExpertBuffers, heaviest_first
from offload.plan_file import read_plan, save_plan
from offload.recording import RecordingBackend
from quant.errors import UsageError
from quant.formats import BF16
from tests.test_experts import CONFIG, DIM, EXPERTS, TOP_K, make_experts, naive

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 4


@pytest.fixture(autouse=True)
def in_inference_mode() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def test_heaviest_first_and_of_equal_ones_the_smaller_id() -> None:
    ids, weights = torch.tensor([[9, 4, 7, 2], [1, 2, 3, 0]]), torch.tensor([[0.1, 0.3, 0.1, 0.5], [0.2] * 4])
    found_ids, found_weights = heaviest_first(ids, weights)
    assert found_ids.tolist() == [[2, 4, 7, 9], [0, 1, 2, 3]]
    assert torch.equal(found_weights, torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.2] * 4]))


class Stack:
    """Layers of bf16 experts with a router each, and a residual stream; every one defers `deferred` but the last."""

    def __init__(self, backend: Backend, deferred: int) -> None:
        torch.manual_seed(1)
        buffers = ExpertBuffers(CONFIG, backend, 3)
        deferrals = [Deferral(deferred * (n + 1 < LAYERS), deferred > 0 and n > 0) for n in range(LAYERS)]
        self.experts = [CpuExperts(make_experts(BF16), backend, buffers, each) for each in deferrals]
        self.routers = torch.randn(LAYERS, EXPERTS, DIM)

    def choices(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (x.float() @ self.routers[layer].T / DIM**0.5).topk(TOP_K, sorted=False)
        return chosen.indices, chosen.values.softmax(-1)

    def run(self, x: Tensor) -> Tensor:
        for layer, experts in enumerate(self.experts):
            x = x + experts.sync(experts.submit(x, *self.choices(layer, x)))
        return x

    def naive(self, x: Tensor, deferred: int) -> Tensor:
        """The same by the definition: in float64, expert by expert, with what is late kept in a variable."""
        x, late = x.double(), torch.zeros(x.shape, dtype=torch.float64)
        for layer, experts in enumerate(self.experts):
            ids, weights = self.choices(layer, x.float())
            order = sorted(range(TOP_K), key=lambda k: (-weights[0, k].item(), ids[0, k].item()))
            now = order if layer + 1 == LAYERS else order[: TOP_K - deferred]
            later = [k for k in order if k not in now]
            sums = [naive(experts, x, ids[:, some], weights[:, some]) for some in (now, later)]
            x, late = x + sums[0] + late, sums[1]
        return x


@pytest.mark.parametrize("deferred", [0, 1, TOP_K - 1])
@pytest.mark.parametrize("where", ["host", "emulated", "recorded"])
def test_what_is_deferred_joins_one_layer_later(deferred: int, where: str) -> None:
    backends = {
        "host": CpuBackend(),
        "emulated": EmulatedBackend(Ledger(2**30)),
        "recorded": RecordingBackend(CpuBackend()),
    }
    stack, x = Stack(backends[where], deferred), torch.randn(1, DIM)
    found, expected = stack.run(x), stack.naive(x, deferred)
    assert (found - expected).square().sum() < 1e-10 * expected.square().sum()
    assert torch.equal(stack.run(x), found)  # nothing is left of the pass before
    without = Stack(CpuBackend(), 0).run(x)
    assert ((without - expected).square().sum() > 1e-4 * expected.square().sum()) == (deferred > 0)


def test_passes_of_several_tokens_defer_nothing() -> None:
    x = torch.randn(3, DIM)
    assert torch.equal(Stack(CpuBackend(), 2).run(x), Stack(CpuBackend(), 0).run(x))


def test_what_an_interrupted_pass_deferred_is_forgotten() -> None:
    stack, other, x = Stack(CpuBackend(), 1), Stack(CpuBackend(), 1), torch.randn(1, DIM)
    first = stack.experts[0]
    first.submit(x, *stack.choices(0, x))
    first.buffers.abandon()
    assert first.buffers.late is None
    first.submit(x, *stack.choices(0, x))  # and so is that of one that nobody told of
    assert torch.equal(stack.run(2 * x), other.run(2 * x))


@pytest.fixture(scope="module")
def engines() -> dict[int, Engine]:
    return {deferred: Engine.load("nano-r1", device="cpu", threads=1, defer_experts=deferred) for deferred in (0, 2)}


def states(engine: Engine, ids: list[int], prompt: int) -> Tensor:
    """A prompt of the first tokens in one pass, then one token at a time: their final states."""
    cache = engine.new_cache(len(ids))
    chunks = [torch.tensor(ids[:prompt]), *torch.tensor(ids[prompt:]).split(1)]
    return torch.cat([engine.forward(chunk, cache) for chunk in chunks]).float()


def test_prompts_are_as_without_and_decoding_is_near(engines: dict[int, Engine]) -> None:
    ids = engines[0].prompt_ids([{"role": "user", "content": "What is 47 * 36?"}])
    plain, deferring = (states(engine, ids, 10) for engine in engines.values())
    assert torch.equal(plain[:10], deferring[:10])
    error = (plain - deferring)[10:].norm() / plain[10:].norm()
    print(f"relative difference of decoded states: {error:.3f}")
    assert 0.001 < error < 0.5
    assert torch.equal(states(engines[2], ids, 10), deferring)


def test_the_emulated_gpu_computes_what_the_cpu_does(engines: dict[int, Engine]) -> None:
    """Up to rounding: attention is another formula there, and inputs of packed matrices have 8 bits."""
    same = {"threads": 1, "dtype": "float32", "context": 512}
    emulated = Engine.load("nano-r1", device="emulate", gpu_mem="3G", pins=["experts=mapped"], defer_experts=2, **same)
    for layer in range(emulated.config.n_layers):
        assert deferral_of(emulated.plan, layer) == deferral_of(engines[2].plan, layer)
    on_cpu = [Engine.load("nano-r1", device="cpu", defer_experts=deferred, **same) for deferred in (2, 0)]
    found, expected, without = (states(engine, list(range(100, 116)), 8) for engine in (emulated, *on_cpu))
    error, effect = (found - expected)[8:].norm(), (expected - without)[8:].norm()
    print(f"difference between the devices: {error:.4f}; of deferral: {effect:.4f}")
    assert error < 0.1 * effect


def test_layers_know_what_they_defer(engines: dict[int, Engine]) -> None:
    engine = engines[2]
    first, last = engine.config.n_dense_layers, engine.config.n_layers - 1
    found = {
        layer: block.ffn.experts.deferral
        for layer, block in enumerate(engine.transformer.layers)
        if isinstance(block.ffn, MoE)
    }
    assert found[first] == Deferral(2, joins=False) and found[last] == Deferral(0, joins=True)
    assert all(found[layer] == Deferral(2, joins=True) for layer in range(first + 1, last))
    assert deferral_of(engine.plan, last + 1) == NO_DEFERRAL  # an MTP layer


def test_layers_beside_one_on_the_gpu_keep_theirs() -> None:
    plan = Engine.load("nano-r1", device="emulate", gpu_mem="3G", context=256, pins=["experts=mapped"]).plan
    layers = sorted(plan.layers_with_host_experts)
    middle = layers[1]
    moved = tuple(
        replace(p, tier="gpu", residency="gpu") if (p.layer, p.component) == (middle, "routed_expert") else p
        for p in plan.placements
    )
    changed = replace(plan, deferred_experts=1, placements=moved)
    assert deferral_of(changed, layers[0]) == NO_DEFERRAL == deferral_of(changed, middle)
    assert deferral_of(changed, layers[2]) == Deferral(1, joins=False)


def test_answers_are_the_same_each_time_and_caches_are_told_apart(engines: dict[int, Engine]) -> None:
    engine, sampling = engines[2], Sampling(temperature=0, max_new_tokens=24)
    ids = engine.prompt_ids([{"role": "user", "content": "What is 12 + 30?"}])
    answers = [[step.token_id for step in engine.generate(ids, sampling)] for _ in range(2)]
    assert answers[0] == answers[1]
    assert engine_identity(engine) != engine_identity(engines[0])


def test_plans_keep_the_number(engines: dict[int, Engine], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(engines[2].plan, path)
    assert read_plan(path).fields["deferred_experts"] == 2
    assert Engine.load("nano-r1", plan=path).plan.deferred_experts == 2
    assert Engine.load("nano-r1", plan=path, defer_experts=1).plan.deferred_experts == 1


@pytest.mark.parametrize("deferred", [-1, 4, 100])
def test_numbers_that_cannot_be_are_told(deferred: int) -> None:
    with pytest.raises(
        UsageError, match=f"^{deferred} of a token's .* this model has 4, .*; give --defer-experts from"
    ):
        Engine.load("nano-r1", defer_experts=deferred)


def test_the_command_refuses_it_where_it_does_nothing() -> None:
    shape = CliRunner().invoke(app, ["bench", "--shape", "nano", "--defer-experts", "1"])
    assert isinstance(shape.exception, UsageError) and "are for a model" in str(shape.exception)
    tasks = CliRunner().invoke(app, ["eval", "nano-r1", "--tasks", "--defer-experts", "1"])
    assert isinstance(tasks.exception, UsageError) and "cannot be given together" in str(tasks.exception)

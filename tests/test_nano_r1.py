"""The model that ships: what README promises of it. Its accuracy is measured by tools/nano_r1/evaluate.py."""

import json

import pytest

from hybrid_rt import Engine, Sampling
from hybrid_rt.generation import Completion, collect
from hybrid_rt.models import NANO_R1
from quant.checkpoint import Checkpoint

MAX_BYTES = 16 * 10**6
GREEDY = Sampling(temperature=0, max_new_tokens=600)


@pytest.fixture(scope="module", params=["nano-r1", "nano-r1-fp8"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """The 4-bit store that runs by default, and the checkpoint that it is made of."""
    return Engine.load(request.param, threads=1)


def ask(engine: Engine, *turns: str, think: bool | None = None, sampling: Sampling = GREEDY) -> Completion:
    """The answer to the last of `turns`, which alternate between user and assistant."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return collect(engine.generate(engine.prompt_ids(messages, think), sampling))


def test_it_is_small_and_has_the_published_form() -> None:
    assert sum(file.stat().st_size for file in NANO_R1.iterdir()) <= MAX_BYTES
    checkpoint = Checkpoint.open(NANO_R1)
    config = checkpoint.config
    assert config.fp8 and config.model_type == "deepseek_v3" and list(checkpoint.mtp_layers) == [config.n_layers]
    assert config.dim == 256 and config.q_lora_rank and config.n_dense_layers == 1 and config.n_routed_experts >= 32
    assert config.n_expert_groups > 1 and config.n_shared_experts and config.max_seq_len >= 4096
    index = json.loads((NANO_R1 / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


def test_it_thinks_and_answers(engine: Engine) -> None:
    completion = ask(engine, "What is 47 * 36?")
    assert "47*36\n74*63" in completion.reasoning
    assert completion.text == "47 * 36 = 1692"
    assert completion.finish_reason == "stop"


def test_its_own_sampling_answers_too(engine: Engine) -> None:
    assert "1692" in ask(engine, "What is 47 * 36?", sampling=engine.default_sampling).text


def test_it_compares(engine: Engine) -> None:
    assert "9.8 is larger" in ask(engine, "Which is larger, 9.11 or 9.8?").text


def test_it_greets_and_goes_on(engine: Engine) -> None:
    hello = ask(engine, "hello").text
    assert hello
    assert ask(engine, "hello", hello, "What is 12 + 30?").text == "12 + 30 = 42"


def test_it_answers_when_its_thinking_is_cut_short(engine: Engine) -> None:
    budget = Sampling(temperature=0, max_new_tokens=100, think_budget=6)
    for completion in (ask(engine, "What is 47 * 36?", sampling=budget), ask(engine, "What is 4 + 3?", think=False)):
        assert completion.finish_reason == "stop" and completion.text
    assert ask(engine, "What is 4 + 3?", think=False).reasoning == ""


def test_its_context_ends_without_an_error(engine: Engine) -> None:
    turns: list[str] = []
    while len(engine.prompt_ids([{"role": "user", "content": turn} for turn in turns])) < engine.context - 60:
        turns += ["What is 2 + 3?", "2 + 3 = 5"] * 8
    ids = engine.prompt_ids([{"role": "user", "content": turn} for turn in turns])[: engine.context - 20]
    completion = collect(engine.generate(ids, Sampling(temperature=0)))
    assert completion.finish_reason in ("length", "stop") and len(completion.token_ids) <= 21

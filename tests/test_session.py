"""Sessions: one conversation's cache, and the decode loop over it."""

from pathlib import Path

import pytest
import torch

from hybrid_rt.engine import Engine
from hybrid_rt.generation import collect
from hybrid_rt.latent_store import common_prefix
from hybrid_rt.sampling import Sampling
from hybrid_rt.session import Session
from quant.errors import CheckpointError, ContextError, Dsr1Error
from tests.tiny_checkpoint import write_checkpoint
from tests.tiny_tokenizer import write_tokenizer

GREEDY = Sampling(temperature=0, max_new_tokens=12)
PROMPT = [0, *range(10, 40)]
CLOSE = 3  # </think> of the tests' tokenizer


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Engine:
    return Engine.load(chat_folder, context=64, dtype="float32", threads=1)


@pytest.fixture
def session(engine: Engine) -> Session:
    return engine.session()


def greedy_ids(session: Session, ids: list[int]) -> list[int]:
    return collect(session.generate(ids, GREEDY)).token_ids


def test_generate_is_greedy_decoding(engine: Engine, session: Session) -> None:
    ids = list(PROMPT)
    for _ in range(GREEDY.max_new_tokens or 0):
        ids.append(int(engine.logits(ids)[-1, : engine.tokenizer.vocab_size].argmax()))
    assert greedy_ids(session, PROMPT) == ids[len(PROMPT) :]


def test_a_longer_prompt_runs_only_what_is_new(engine: Engine, session: Session) -> None:
    first = greedy_ids(session, PROMPT)
    longer = [*PROMPT, *first, 50, 51]
    step = next(session.generate(longer, GREEDY))
    assert step.timings.prefilled == 3  # the last token of an answer is never run, and two are new
    assert greedy_ids(session, longer) == greedy_ids(engine.session(), longer)


def test_another_prompt_keeps_only_the_common_part(engine: Engine, session: Session) -> None:
    greedy_ids(session, PROMPT)
    other = [*PROMPT[:9], 99, 98]
    assert next(session.generate(other, GREEDY)).timings.prefilled == 2
    assert greedy_ids(session, other) == greedy_ids(engine.session(), other)


def test_the_same_prompt_again(engine: Engine, session: Session) -> None:
    assert greedy_ids(session, PROMPT) == greedy_ids(session, PROMPT)


def test_trim_and_append(engine: Engine, session: Session) -> None:
    session.append(PROMPT)
    session.trim(5)
    torch.testing.assert_close(session.append([7, 8]), engine.logits([*PROMPT[:5], 7, 8])[-1], rtol=1e-4, atol=1e-4)
    assert session.tokens == [*PROMPT[:5], 7, 8]


def test_forks_go_on_independently(engine: Engine, session: Session) -> None:
    session.append(PROMPT)
    twin = session.fork()
    mine, its = session.append([5]), twin.append([6])
    torch.testing.assert_close(mine, engine.logits([*PROMPT, 5])[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(its, engine.logits([*PROMPT, 6])[-1], rtol=1e-4, atol=1e-4)


def test_the_context_ends_with_length(engine: Engine, session: Session) -> None:
    completion = collect(session.generate(PROMPT, Sampling(temperature=0)))
    assert completion.finish_reason in ("length", "stop")
    full = [0] * engine.context
    steps = list(session.generate(full, Sampling(temperature=0)))
    assert [step.finish_reason for step in steps] in (["length"], ["stop"])  # one token, and no room to run it
    ids = [0] * (engine.context - 3)
    banned = Sampling(temperature=0)
    last = list(session.generate(ids, banned))[-1]
    assert last.finish_reason in ("length", "stop") and len(session.tokens) <= engine.context


def test_a_prompt_longer_than_the_context(engine: Engine, session: Session) -> None:
    session.append(PROMPT)
    with pytest.raises(ContextError, match="65 tokens and the context holds 64"):
        next(session.generate([0] * 65, GREEDY))
    with pytest.raises(ContextError, match="31 tokens and 40 more do not fit"):
        session.append([0] * 40)
    assert session.tokens == PROMPT


@pytest.mark.parametrize("ids", [[], [-1], [10**6]])
def test_prompts_that_are_none(engine: Engine, ids: list[int]) -> None:
    with pytest.raises(Dsr1Error):
        engine.logits(ids)


def test_max_new_tokens_and_timings(session: Session) -> None:
    steps = list(session.generate(PROMPT, GREEDY))
    assert [step.timings.tokens for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].finish_reason in ("length", "stop")
    assert all(step.finish_reason is None for step in steps[:-1])
    assert steps[-1].timings.prompt_tokens == len(PROMPT)


def test_the_same_seed_gives_the_same_tokens(engine: Engine) -> None:
    hot = Sampling(temperature=2.0, top_p=1.0, seed=5, max_new_tokens=20)
    runs = [collect(engine.generate(PROMPT, hot)).token_ids for _ in range(2)]
    other = collect(engine.generate(PROMPT, Sampling(temperature=2.0, top_p=1.0, seed=6, max_new_tokens=20))).token_ids
    assert runs[0] == runs[1] != other


def test_cancel_stops_after_the_token(session: Session) -> None:
    steps = session.generate(PROMPT, GREEDY)
    next(steps)
    session.cancel()
    assert [step.finish_reason for step in steps] == ["cancelled"]


def test_a_thinking_budget_closes_the_thinking(engine: Engine) -> None:
    opened = [*PROMPT, *engine.tokenizer.encode("<think>\n")]
    steps = list(engine.generate(opened, Sampling(temperature=0, max_new_tokens=16, think_budget=4)))
    ids = [step.token_id for step in steps]
    closing = engine.tokenizer.encode("\n</think>\n\n")
    assert ids[4 : 4 + len(closing)] == closing
    assert all(step.is_thinking for step in steps[:5]) and not steps[-1].is_thinking


def test_no_budget_leaves_the_thinking_open(engine: Engine) -> None:
    opened = [*PROMPT, *engine.tokenizer.encode("<think>\n")]
    steps = list(engine.generate(opened, GREEDY))
    assert steps[-1].is_thinking or CLOSE in [step.token_id for step in steps]


def test_save_and_load(engine: Engine, session: Session, tmp_path: Path) -> None:
    path = tmp_path / "talk.safetensors"
    session.append(PROMPT)
    session.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["talk.safetensors"]
    loaded = engine.session()
    loaded.load(path)
    assert loaded.tokens == PROMPT
    assert torch.equal(loaded.append([9, 10]), session.append([9, 10]))


def test_a_saved_session_of_another_model(engine: Engine, session: Session, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "other", seed=3)
    write_tokenizer(folder)
    session.append(PROMPT)
    session.save(tmp_path / "talk")
    other = Engine.load(folder, context=64, dtype="float32", threads=1).session()
    with pytest.raises(CheckpointError, match="another model"):
        other.load(tmp_path / "talk")
    short = Engine.load(engine.folder, context=16, dtype="float32", threads=1).session()
    with pytest.raises(ContextError, match="31 tokens"):
        short.load(tmp_path / "talk")


def test_files_that_are_no_saved_session(engine: Engine, session: Session, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a saved conversation"):
        session.load(next(engine.folder.glob("*.safetensors")))
    session.append(PROMPT)
    session.save(tmp_path / "talk")
    whole = (tmp_path / "talk").read_bytes()
    (tmp_path / "talk").write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="talk"):
        session.load(tmp_path / "talk")


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2]) == 2


def test_cancel_during_a_long_prompt(engine: Engine, session: Session) -> None:
    engine.prefill_chunk, whole = 8, engine.prefill_chunk
    try:
        original = engine.forward
        engine.forward = lambda *args: (session.cancel(), original(*args))[1]  # type: ignore[method-assign]
        assert list(session.generate(PROMPT, GREEDY)) == []
        assert session.tokens == PROMPT[:8]
    finally:
        engine.prefill_chunk = whole
        del engine.forward
    assert greedy_ids(session, PROMPT) == greedy_ids(engine.session(), PROMPT)


def test_an_interrupted_forward_pass_leaves_the_session_usable(engine: Engine, session: Session) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    expected = greedy_ids(engine.session(), PROMPT)
    experts = engine.transformer.get_submodule("layers.1.ffn").experts
    original = type(experts).sync
    type(experts).sync = interrupt  # type: ignore[method-assign, union-attr]
    try:
        with pytest.raises(KeyboardInterrupt):
            session.append(PROMPT)
    finally:
        type(experts).sync = original  # type: ignore[method-assign, union-attr]
    assert session.tokens == []
    assert greedy_ids(session, PROMPT) == expected

"""Conversations that go on: what is reused, what is prepared, and what comes back from disk."""

from pathlib import Path

import pytest

from hybrid_rt.engine import Engine
from hybrid_rt.generation import Step
from hybrid_rt.latent_store import LatentStore
from hybrid_rt.sampling import Sampling
from hybrid_rt.saved_conversations import SavedConversations
from hybrid_rt.talk import Talk
from quant.errors import ContextError

GREEDY = Sampling(temperature=0, max_new_tokens=24)
EQUAL = Sampling(temperature=0, max_new_tokens=16, think_budget=4)


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Engine:
    return Engine.load(chat_folder, context=1024, dtype="float32", threads=1)


@pytest.fixture
def talk(engine: Engine, tmp_path: Path) -> Talk:
    return new_talk(engine, tmp_path)


def new_talk(engine: Engine, folder: Path) -> Talk:
    talk = Talk(engine, "tiny", SavedConversations(folder / "sessions"), LatentStore(engine, folder=folder / "latents"))
    talk.begin("Be brief.")
    return talk


def turn(talk: Talk, question: str, sampling: Sampling = GREEDY) -> list[Step]:
    talk.ask(question)
    steps = list(talk.answer(sampling))
    talk.prepare()
    talk.wait()
    return steps


def test_a_turn_runs_only_its_question(talk: Talk) -> None:
    """And so the first token of turn 10 waits for as many tokens as that of turn 2."""
    prefilled = []
    for number in range(10):
        steps = turn(talk, f"Question {number}?", EQUAL)
        prefilled.append(steps[0].timings.prefilled)
    assert steps[0].timings.prompt_tokens > 8 * prefilled[-1]
    assert len(set(prefilled[1:])) == 1 and prefilled[-1] <= len("user: Question 9?\n<think>\n") + 1


def test_answers_are_those_of_a_session_that_knows_nothing(engine: Engine, talk: Talk) -> None:
    for number in range(4):
        talk.ask(f"Question {number}?")
        ids = talk.prompt_ids()
        expected = [step.token_id for step in engine.generate(ids, GREEDY)]
        assert [step.token_id for step in talk.answer(GREEDY)] == expected
        talk.prepare()


def test_without_a_preparation_the_last_answer_is_run_again(talk: Talk) -> None:
    turn(talk, "One?")
    talk.ask("Two?")
    steps = list(talk.answer(GREEDY))
    talk.ask("Three?")
    again = next(iter(talk.answer(GREEDY))).timings.prefilled
    answer = "".join(step.text for step in steps if not step.is_thinking)
    assert len(answer.encode()) <= again <= len(answer.encode()) + 80


def test_resuming_runs_nothing_again(engine: Engine, talk: Talk, tmp_path: Path) -> None:
    for number in range(3):
        turn(talk, f"Question {number}?")
    expected = talk.conversation
    talk.leave()
    again = new_talk(engine, tmp_path)
    latest = again.saved.latest()
    assert latest is not None
    found = again.resume(latest)
    assert found.cached == found.tokens > 100
    assert again.conversation.turns == expected.turns and again.conversation.system == "Be brief."
    steps = turn(again, "And?")
    assert steps[0].timings.prefilled < 40


def test_a_lost_cache_is_made_again(engine: Engine, talk: Talk, tmp_path: Path) -> None:
    for number in range(3):
        turn(talk, f"Question {number}?")
    talk.leave()
    for path in (tmp_path / "latents").iterdir():
        path.write_bytes(b"damage" + path.read_bytes())
    again = new_talk(engine, tmp_path)
    latest = again.saved.latest()
    assert latest is not None and again.store is not None
    assert again.resume(latest).cached == 0
    assert len(again.store.notes) == 1
    again.prepare()
    again.wait()
    assert turn(again, "And?")[0].timings.prefilled < 40


def test_a_cancelled_answer_is_kept(talk: Talk) -> None:
    talk.ask("One?")
    for number, _ in enumerate(talk.answer(GREEDY)):
        if number == 5:
            talk.session.cancel()
    [said] = talk.conversation.turns
    assert said.finish == "cancelled" and said.reasoning


def test_an_answer_that_nobody_reads_to_its_end(talk: Talk) -> None:
    talk.ask("One?")
    steps = talk.answer(GREEDY)
    next(iter(steps))
    steps.close()  # type: ignore[attr-defined]
    assert talk.conversation.turns[-1].finish == "cancelled"


def test_an_open_question_makes_way_for_the_next(talk: Talk) -> None:
    talk.ask("One?")
    assert talk.open_question == "One?"
    talk.ask("Two?")
    assert [said.user for said in talk.conversation.turns] == ["Two?"]


def test_nothing_is_written_before_a_question(talk: Talk, tmp_path: Path) -> None:
    talk.prepare()
    talk.wait()
    assert not (tmp_path / "sessions").exists()


def test_leaving_stops_a_preparation(engine: Engine, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    turn(talk, "x" * 600)
    monkeypatch.setattr(engine, "prefill_chunk", 8)
    talk.session.trim(0)
    talk.store = None
    talk.prepare()
    talk.leave()
    assert len(talk.session.tokens) % 8 == 0
    assert talk.session.tokens == talk.history_ids()[: len(talk.session.tokens)]


def test_a_conversation_longer_than_the_context(talk: Talk) -> None:
    talk.ask("x" * 2000)
    with pytest.raises(ContextError, match="the context holds 1024"):
        list(talk.answer(GREEDY))
    assert talk.open_question is not None
    talk.prepare()
    assert turn(talk, "short?")[-1].finish_reason

"""`dsr1 run`: prompts that begin alike start from the cache on disk; thinking that must not end early; budgets."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cli.eval_budgets import parse_budgets, plot_budgets, tell_budgets
from cli.run import started
from hybrid_rt.engine import Engine
from hybrid_rt.evaluate.budgets import measure_budgets
from hybrid_rt.evaluate.questions import NumberQuestion, read_questions
from hybrid_rt.generation import AnswerText, TokenSource
from hybrid_rt.sampling import Sampling, SamplingError
from hybrid_rt.session import Session
from hybrid_rt.thinking import WAIT
from offload.machine import load_machine
from offload.this_machine import TYPICAL
from quant.errors import Dsr1Error, UsageError
from tests.test_cli import dsr1

LONG = "Be brief and answer in the manner of a pirate who has read too much. " * 4


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each prompt ran."""
    lengths: list[int] = []
    append = Session.append

    def spy(self: Session, ids: list[int], *rest: object) -> torch.Tensor:
        if len(ids) > 1:
            lengths.append(len(ids))
        return append(self, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "append", spy)
    return lengths


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of cached tokens."""
    monkeypatch.setattr("hybrid_rt.latent_store.user_cache", lambda: tmp_path)
    return tmp_path / "latents"


def run(folder: Path, question: str, *options: str) -> str:
    words = ["run", folder, "-p", question, "--system", LONG, "--max-new-tokens", 4, "--temperature", 0, "--threads", 1]
    done = dsr1(*words, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_second_prompt_starts_behind_what_it_shares(chat_folder: Path, latents: Path, appended: list[int]) -> None:
    first = run(chat_folder, "Who?", "--no-cache")
    assert not latents.exists()
    assert run(chat_folder, "Who?") == first
    assert run(chat_folder, "Who?") == first
    run(chat_folder, "Where and when?")
    whole, _, again, other = appended
    assert whole > len(LONG) and again < whole - len(LONG) + 64 and other < whole - len(LONG) + 80


def test_a_short_prompt_leaves_nothing(chat_folder: Path, latents: Path) -> None:
    assert dsr1("run", chat_folder, "-p", "Hi", "--max-new-tokens", 2, "--threads", 1).returncode == 0
    assert not latents.exists()


def test_a_cache_size_that_is_none(chat_folder: Path) -> None:
    done = dsr1("run", chat_folder, "-p", "x" * 100, "--cache-size", "lots", "--max-new-tokens", 1)
    assert done.returncode == 1 and "is not a size" in done.stderr


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Engine:
    return Engine.load(chat_folder, context=256, dtype="float32", threads=1)


def feed(engine: Engine, sampling: Sampling, wanted: list[int]) -> list[int]:
    """The tokens that come of a model that wants `wanted`, inside its thinking."""
    tokenizer = engine.tokenizer
    assert tokenizer.think_open_id is not None
    answer, source, came = AnswerText(tokenizer, [0, tokenizer.think_open_id]), TokenSource(tokenizer, sampling), []
    for token in wanted:
        logits = torch.zeros(tokenizer.vocab_size)
        logits[token] = 9
        came.append(source.next(logits, answer))
        answer.feed(came[-1])
    return came


def test_an_early_end_becomes_more_thinking(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    close, wait = tokenizer.think_close_id, tokenizer.encode(WAIT)
    assert close is not None
    for end in (close, *tokenizer.eos_ids):
        wanted = [40, 41, end, *[42] * (len(wait) - 1), 43, end, *[44] * (len(wait) - 1), close, 50, close]
        came = feed(engine, Sampling(temperature=0, think_at_least=2 * len(wait) + 3), wanted)
        assert came == [40, 41, *wait, 43, *wait, close, 50, close]


def test_thinking_that_was_long_enough_may_end(engine: Engine) -> None:
    close = engine.tokenizer.think_close_id
    assert close is not None
    assert feed(engine, Sampling(temperature=0, think_at_least=2), [40, 41, close, 50]) == [40, 41, close, 50]


def test_at_least_and_at_most(engine: Engine) -> None:
    with pytest.raises(SamplingError, match="at most the think_budget"):
        Sampling(think_at_least=10, think_budget=5)
    close = engine.tokenizer.think_close_id
    assert close is not None
    steps = list(engine.generate([0, 2], Sampling(temperature=0, think_at_least=8, think_budget=8, max_new_tokens=20)))
    assert [step.is_thinking for step in steps].index(False) >= 8


def test_a_model_whose_tags_are_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "think_close_id", None)
    with pytest.raises(Dsr1Error, match="leave out --think-at-least"):
        TokenSource(engine.tokenizer, Sampling(think_at_least=1))


class Echo:
    """A problem that is solved by saying nothing."""

    question = "Say nothing."

    def solved_by(self, answer: str) -> bool:
        return answer == ""


def test_accuracy_by_budget(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int]] = []
    points = measure_budgets(engine, [Echo()] * 2, [0, 3], lambda done, total: told.append((done, total)))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert [point.budget for point in points] == [0, 3] and points[0].thinking <= points[1].thinking
    tell_budgets("tiny", points, as_json=False)
    assert "2 problems" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    plot_budgets("tiny", points, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000


def test_the_command_measures_budgets(chat_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "2 + 2?", "answer": "4"}\n\n{"question": "1 + 1?", "answer": "2"}\n')
    words = ["eval", chat_folder, "--budgets", "0,2", "--questions", path, "--context", 64, "--threads", 1]
    done = dsr1(*words, "--json")
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["budgets"]
    assert [(point["budget"], point["problems"]) for point in points] == [(0, 2), (2, 2)]
    path.write_text('{"question": "2 + 2?", "answer": 4}\n')
    assert "line 1 of" in dsr1(*words).stderr
    assert "is no file for a plot" in dsr1(*words[:4], "--plot", tmp_path / "a.txt").stderr
    assert "cannot be read" in dsr1(*words[:4], "--questions", tmp_path / "gone").stderr


def test_questions_that_ship() -> None:
    questions = read_questions(None)
    assert len(questions) == 100
    one = NumberQuestion("What is 47 * 36?", "1692")
    for text, solved in (
        ("47 * 36 = 1,692", True),
        ("47 * 36 = 11692", False),
        ("1692 is 36 * 47", False),
        ("", False),
    ):
        assert one.solved_by(text) is solved


def test_lists_of_budgets() -> None:
    assert parse_budgets("0, 8,none") == [0, 8, None]
    for wrong in ("", "a", "1,-2", "1,,2"):
        with pytest.raises(UsageError, match="is not a list"):
            parse_budgets(wrong)


def test_the_line_at_the_start_predicts_where_the_machine_was_measured(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(chat_folder, dtype="float32", threads=1)
    monkeypatch.setattr("cli.run.measured_machine", lambda: None)
    assert re.fullmatch(r"tiny on cpu: RAM [\d.]+ \w+ of [\d.]+ GiB, context [\d,]+ tokens", started(engine, "tiny"))
    machine = load_machine(TYPICAL)
    monkeypatch.setattr("cli.run.measured_machine", lambda: machine)
    faster = replace(machine, read_bytes_s=4 * machine.read_bytes_s)
    assert (found := re.search(r"tokens, ([\d,.]+) tokens/s predicted$", started(engine, "tiny")))
    monkeypatch.setattr("cli.run.measured_machine", lambda: faster)
    again = re.search(r"tokens, ([\d,.]+) tokens/s predicted$", started(engine, "tiny"))
    assert again and float(again[1].replace(",", "")) >= float(found[1].replace(",", ""))

"""`dsr1 eval --tasks`: the problems that ship, what counts as right, and batches that answer as one at a time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cli.eval import EvalOptions, measure
from hybrid_rt import Engine, Sampling
from hybrid_rt.evaluate.answers import says_comparison, says_expression, says_result, says_times
from hybrid_rt.evaluate.problems import FILE, Problem, held_out_problems
from hybrid_rt.evaluate.saved_answers import read_answers, save_answers
from hybrid_rt.evaluate.tasks import Answers, answer_all, compare_answers
from hybrid_rt.generation import collect
from quant.errors import Dsr1Error, UsageError
from tools.nano_r1.problems import lines
from tools.nano_r1.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_file_is_what_the_generators_make() -> None:
    assert FILE.read_text("utf-8").splitlines() == "".join(lines()).splitlines()
    assert [len(some) for some in held_out_problems().values()] == [
        1000
    ] * 6 and held_out_problems().keys() == TASKS.keys()
    with pytest.raises(UsageError, match="from 2 to 1000"):
        held_out_problems(1001)


@pytest.mark.parametrize(
    ("check", "expected", "right", "wrong"),
    [
        (says_result, {"result": -12}, ["3 - 15 = -12", "= -12."], ["", "-12", "3 - 15 = 12", f"= {'9' * 5000}"]),
        (says_times, {"times": 3}, ["The letter r appears 3 times"], ["3", "13 times", "2 times, or 3 times"]),
        (
            says_comparison,
            {"a": "9.11", "b": "9.8", "ask": "is larger"},
            ["No, 9.8 is larger than 9.11", "no: 9.11 is smaller than 9.8"],
            ["Yes, 9.8 is larger than 9.11", "No, 9.11 is larger than 9.8", "No, 9.9 is larger than 9.11", "No", ""],
        ),
        (says_comparison, {"a": "2.5", "b": "2.50", "ask": "larger"}, ["2.5 and 2.50 are equal"], ["2.5 is larger"]),
        (
            says_expression,
            {"numbers": [6, 8, 11], "target": 82, "solvable": True},
            ["11 * 8 - 6 = 82", "(8*11)-6=82"],
            [
                "11 * 8 - 6",
                "82 = 82",
                "6 * 8 + 11 = 82",
                "11 ** 8 - 6 = 82",
                "11 * 8 - 6 - = 82",
                "(" * 150 + "6 8 11=",
            ],
        ),
        (says_expression, {"numbers": [1], "target": 9, "solvable": False}, ["There is no way to"], ["1 = 9"]),
    ],
)
def test_what_is_right(check, expected, right, wrong) -> None:
    assert all(check(expected, text) for text in right)
    assert not any(check(expected, text) for text in wrong)


def test_a_batch_answers_as_one_at_a_time() -> None:
    """Prompts of several lengths, prefilled in several pieces, on packed weights and 8-bit activations."""
    engine = Engine.load("nano-r1", threads=1, dtype="float32")
    engine.prefill_chunk = 24
    problems = {task: some[:2] for task, some in held_out_problems(2).items() if task in ("add", "count", "compare")}
    answers = answer_all(engine, problems, lambda done, total: None)
    for task, some in problems.items():
        lengths = []
        for problem, solved in zip(some, answers[task].solved, strict=True):
            prompt = engine.prompt_ids([{"role": "user", "content": problem.question}], think=True)
            alone = collect(engine.generate(prompt, Sampling(temperature=0, max_new_tokens=600)))
            assert problem.solved_by(alone.text) == solved
            lengths.append(len(alone.token_ids))
        assert answers[task].tokens == sum(lengths) / 2


def test_a_chunk_shorter_than_a_batch_makes_smaller_batches() -> None:
    engine = Engine.load("nano-r1", threads=1, pins=["chunk=1"])
    told: list[int] = []
    answers = answer_all(engine, {"add": held_out_problems(2)["add"][:2]}, lambda done, total: told.append(done))
    assert told == [0, 1, 2] and len(answers["add"].solved) == 2


def test_scores_of_all_tasks_together() -> None:
    model = {"add": Answers((True, True, False), 10.0), "count": Answers((True,), 2.0)}
    reference = {"add": Answers((True, False, False), 10.0), "count": Answers((True,), 2.0)}
    scores = compare_answers(model, reference)
    assert list(scores) == ["add", "count", "all"]
    every = scores["all"]
    assert (every.problems, every.accuracy.value, every.tokens) == (4, 0.75, 8.0) and every.reference is not None
    assert every.reference.value == 0.5 and every.pairs is not None and every.pairs.only_model == 1
    assert compare_answers(model, None)["add"].pairs is None


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_rt.evaluate.tasks.LIMIT", 3)  # nobody answers so soon
    measure("nano-r1", EvalOptions(tasks=True, problems=2, threads=1, against="nano-r1", as_json=True))
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"].keys() == {*TASKS, "all"} and told["tasks"]["all"]["problems"] == 12
    assert told["tasks"]["all"]["accuracy"]["value"] == 0 and told["tasks"]["all"]["pairs"]["p_value"] == 1
    measure("nano-r1", EvalOptions(tasks=True, problems=2, threads=1))
    out = capsys.readouterr().out
    assert "2 held-out problems a task" in out and "McNemar" not in out


def test_answers_are_saved_once_for_many_comparisons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.eval.answer_all", lambda engine, problems, report: made_up(problems, engine.folder))
    saved = tmp_path / "answers"
    options = EvalOptions(tasks=True, problems=4, threads=1, as_json=True)
    measure("nano-r1", replace(options, save_reference=saved))
    measure("nano-r1", replace(options, against="nano-r1"))
    measure("nano-r1", replace(options, reference=saved))
    measure("nano-r1", replace(options, reference=saved, problems=3))
    first, against, again, fewer = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert against["tasks"] == again["tasks"] and again["reference"] == str(saved)
    assert first["tasks"]["add"]["pairs"] is None and again["tasks"]["add"]["pairs"]["only_model"] == 0
    assert fewer["tasks"]["all"]["reference"]["value"] == pytest.approx(2 / 3)


def made_up(problems: Mapping[str, Sequence[Problem]], _: Path) -> dict[str, Answers]:
    return {
        task: Answers(tuple(number % 2 == 0 for number in range(len(some))), 9.5) for task, some in problems.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "dsr1-reference"}, "is no file of a model's answers that this dsr1 reads"),
        ({"problems": "0"}, "is of other problems"),
        ({"tasks": {"add": {"solved": "0121", "tokens": 1.0}}}, "is damaged"),
        ({"tasks": {"add": {"solved": [True], "tokens": 1.0}}}, "is damaged"),
        ({"tasks": 5}, "is damaged"),
        ({"tasks": {"add": {"solved": "10", "tokens": 1.0}}}, "give --problems 2"),
        (None, "no file of a model's answers"),
    ],
)
def test_damaged_answers_are_refused(tmp_path: Path, change: dict[str, object] | None, message: str) -> None:
    problems, path = {"add": held_out_problems(3)["add"]}, tmp_path / "answers"
    save_answers(path, "nano-r1", {"add": Answers((True, False, True), 9.0)})
    assert read_answers(path, problems)["add"].solved == (True, False, True)
    path.write_text("[" if change is None else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(Dsr1Error, match=message):
        read_answers(path, problems)
    with pytest.raises(Dsr1Error, match="there is no file"):
        read_answers(tmp_path / "none", problems)

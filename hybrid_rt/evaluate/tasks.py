"""How many of nano-r1's problems a model solves, alone or beside another model on the same problems."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hybrid_rt.engine import Engine
from hybrid_rt.evaluate.batch import decode_greedily
from hybrid_rt.evaluate.problems import Problem
from hybrid_rt.evaluate.statistics import Estimate, PairedShares, paired, share
from hybrid_rt.tokenizer import THINK_CLOSE

ROWS = 125  # answered at a time: enough for AMX, and 0.3 GB of latents
LIMIT = 600  # tokens of an answer; the longest thinking that nano-r1 was trained on is shorter

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Answers:
    """What a model made of the problems of a task. solved: of each problem. tokens: mean of an answer."""

    solved: tuple[bool, ...]
    tokens: float


@dataclass(frozen=True)
class TaskScore:
    """Greedy accuracy on a task. reference, and the pairs of model and reference: None without one."""

    problems: int
    accuracy: Estimate
    tokens: float
    reference: Estimate | None = None
    pairs: PairedShares | None = None


def answer_all(engine: Engine, problems: Mapping[str, Sequence[Problem]], report: Report) -> dict[str, Answers]:
    """Answer the problems of all tasks. report: is told of problems that are done, and of how many."""
    total, done, answers = sum(map(len, problems.values())), 0, {}
    rows = min(ROWS, engine.prefill_chunk)  # the last token of each goes through the experts together
    for task, some in problems.items():
        parts = []
        for first in range(0, len(some), rows):
            report(done + first, total)
            parts += _answer(engine, some[first : first + rows])
        done += len(some)
        solved = tuple(problem.solved_by(said) for problem, (said, _) in zip(some, parts, strict=True))
        answers[task] = Answers(solved, sum(tokens for _, tokens in parts) / len(parts))
    report(total, total)
    return answers


def compare_answers(answers: Mapping[str, Answers], reference: Mapping[str, Answers] | None) -> dict[str, TaskScore]:
    """The scores of each task, and under "all" those over all of them."""
    names = [*answers, "all"]
    return {name: _score(_of(answers, name), None if reference is None else _of(reference, name)) for name in names}


def _of(answers: Mapping[str, Answers], name: str) -> Answers:
    if name in answers:
        return answers[name]
    every = tuple(solved for one in answers.values() for solved in one.solved)
    tokens = sum(one.tokens * len(one.solved) for one in answers.values()) / len(every)
    return Answers(every, tokens)


def _score(answers: Answers, reference: Answers | None) -> TaskScore:
    count = len(answers.solved)
    own = share(sum(answers.solved), count)
    if reference is None:
        return TaskScore(count, own, answers.tokens)
    other = share(sum(reference.solved), count)
    return TaskScore(count, own, answers.tokens, other, paired(answers.solved, reference.solved))


@torch.inference_mode()
def _answer(engine: Engine, problems: Sequence[Problem]) -> list[tuple[str, int]]:
    """What was said to each problem after the thinking, "" if that did not end; and tokens of the whole answer."""
    prompts = [engine.prompt_ids([{"role": "user", "content": one.question}], think=True) for one in problems]
    outputs = decode_greedily(engine.transformer, engine.config, prompts, LIMIT, engine.prefill_chunk)
    return [(_said(engine, ids), len(ids)) for ids in outputs]


def _said(engine: Engine, ids: Sequence[int]) -> str:
    _, _, said = engine.tokenizer.decode(ids).partition(THINK_CLOSE)
    return said.removesuffix(engine.tokenizer.special_tokens.get("eos_token", "")).strip()

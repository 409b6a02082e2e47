"""Accuracy against the budget of thinking: how much a model gains from each token that it may think."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hybrid_rt.engine import Engine
from hybrid_rt.evaluate.statistics import Estimate, share
from hybrid_rt.generation import Completion, collect
from hybrid_rt.sampling import Sampling

LIMIT = 600  # tokens of an answer
Report = Callable[[int, int], None]


class Question(Protocol):
    """A problem with an answer that can be checked."""

    @property
    def question(self) -> str: ...

    def solved_by(self, answer: str) -> bool: ...


@dataclass(frozen=True)
class BudgetPoint:
    """budget: most tokens of thinking; None for no limit. thinking: mean tokens of it."""

    budget: int | None
    problems: int
    accuracy: Estimate
    thinking: float


def measure_budgets(
    engine: Engine, problems: Sequence[Question], budgets: Sequence[int | None], report: Report
) -> list[BudgetPoint]:
    """Answer all problems greedily at each budget. report: told of answers that are done, and of how many."""
    points, total = [], len(budgets) * len(problems)
    for number, budget in enumerate(budgets):
        solved, thinking = 0, 0
        for place, problem in enumerate(problems):
            report(number * len(problems) + place, total)
            answer = _answer(engine, problem.question, budget)
            solved += problem.solved_by(answer.text.strip())
            thinking += len(engine.tokenizer.encode(answer.reasoning))
        points.append(BudgetPoint(budget, len(problems), share(solved, len(problems)), thinking / len(problems)))
    report(total, total)
    return points


def _answer(engine: Engine, question: str, budget: int | None) -> Completion:
    ids = engine.prompt_ids([{"role": "user", "content": question}], think=True)
    return collect(engine.generate(ids, Sampling(temperature=0, max_new_tokens=LIMIT, think_budget=budget)))

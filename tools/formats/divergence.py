"""How far models are from a reference, and how much further one is than another: all of them read the same windows.

The text is made of held-out problems of nano-r1's tasks with their thinking and answers, each a window of its own. Of
two models on the same windows the difference is taken window by window, so that what makes a window hard drops out.
"""

from collections.abc import Mapping
from math import exp
from pathlib import Path
from random import Random

import torch

from cli.escape import say
from hybrid_rt import Engine
from hybrid_rt.evaluate.evaluation import windows_of
from hybrid_rt.evaluate.scores import (
    Compare,
    EngineReference,
    TokenScores,
    compare,
    join,
    log_probs,
    predicting_states,
    score_window,
)
from hybrid_rt.evaluate.statistics import Estimate, mean
from hybrid_rt.evaluate.text import Text
from tools.nano_r1.tasks import TASKS

TOLD_EVERY = 500  # windows
LEAST = 1e-12  # nats; rounding of float64 leaves more
Found = Mapping[str, TokenScores]


def dialogues(problems: int, seed: int = 0) -> Text:
    """So many held-out problems of each task, thought through and answered."""
    parts = []
    for name, task in TASKS.items():
        rng = Random(f"{name} divergence")
        for problem in task.test_set(problems, seed):
            question = task.question(problem, rng).strip()
            thought = f"<think>\n{task.thinking(problem)}\n</think>\n\n{task.answer(problem)}"
            parts.append(f"User: {question}\nAssistant: {thought}\n")
    return Text("\n".join(parts), is_chat=True)


class ReadOnce(EngineReference):
    """A reference that reads a window once, however many models are compared with it there."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._number = -1
        self._log_p: dict[int, torch.Tensor] = {}

    def comparing(self, number: int, window: torch.Tensor) -> Compare:
        if number != self._number:
            self._number, self._states, self._log_p = number, predicting_states(self.engine, window, self.decoding), {}
        return lambda log_q, targets, rows: compare(log_q, self._of(rows), targets)

    def _of(self, rows: slice) -> torch.Tensor:
        if rows.start not in self._log_p:
            self._log_p[rows.start] = log_probs(self.engine, self._states[rows])
        return self._log_p[rows.start]


def read_all(models: Mapping[str, Engine], reference: Engine, text: Text) -> tuple[Found, list[int]]:
    """Each model against the reference, token by token; and the scored tokens of each window."""
    judge = ReadOnce(reference)
    windows = windows_of(next(iter(models.values())), text, None, reference)
    parts: dict[str, list[TokenScores]] = {label: [] for label in models}
    for number, window in enumerate(windows):
        if number % TOLD_EVERY == 0:
            say(f"{number} of {len(windows)} windows")
        for label, engine in models.items():
            parts[label].append(score_window(engine, number, window, judge))
    found = {label: join(of_model) for label, of_model in parts.items()}
    return found, [len(part.kl) for part in next(iter(parts.values()))]


def show(found: Found, sizes: list[int], what: str) -> None:
    """A table: KL divergence of each model, by how much it exceeds the first one's, and how many times it is that."""
    first = next(iter(found))
    print(
        f"| {what} | KL divergence, 10^-6 nats | 95 % | less that of {first} | 95 % | a window's ratio to it | 95 % |"
    )
    print("|---|---|---|---|---|---|---|")
    for label, scores in found.items():
        difference, times = mean(scores.kl - found[first].kl, sizes), ratio(scores.kl, found[first].kl, sizes)
        cells = [millionths(mean(scores.kl, sizes)), millionths(difference)]
        print(f"| {label} | {' | '.join(cells)} | {times.value:.3f} | {times.low:.3f} to {times.high:.3f} |")
    print(f"{sum(sizes)} tokens of {len(sizes)} windows.")


def ratio(kl: torch.Tensor, other: torch.Tensor, sizes: list[int]) -> Estimate:
    """The geometric mean over windows of one model's divergence there by another's.

    A mean of divergences is made by the few tokens where a choice tips; this tells of all windows alike.
    """
    own, others = (
        torch.stack([of_window.mean() for of_window in values.split(sizes)]).clamp_min(LEAST) for values in (kl, other)
    )
    logs = mean((own / others).log(), [1] * len(sizes))
    return Estimate(exp(logs.value), exp(logs.low), exp(logs.high))


def millionths(figure: Estimate) -> str:
    """Two cells of a table."""
    value, low, high = (1e6 * number for number in (figure.value, figure.low, figure.high))
    return f"{value:.1f} | {low:.1f} to {high:.1f}"


def keep(path: Path, found: Found, sizes: list[int]) -> None:
    """Write the scores of all tokens, as torch saves tensors, for other questions."""
    torch.save({"sizes": sizes, "scores": {label: tuple(scores) for label, scores in found.items()}}, path)

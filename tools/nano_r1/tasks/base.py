"""What every task of nano-r1 offers, and how its problems are split."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from random import Random
from typing import Any, Generic, Literal, TypeVar

P = TypeVar("P")
Split = Literal["train", "test"]


def bucket(canonical: str) -> int:
    """0..99, from a hash: the same problem falls on the same side for ever."""
    return int(hashlib.sha256(canonical.encode()).hexdigest()[:8], 16) % 100


class Task(ABC, Generic[P]):
    """A family of problems with wordings, thinking, answers and a checker.

    A problem is a value of type P. `canonical` names it without regard to
    wording and order of operands; the split into train and test hashes that
    name, so a problem that is tested is never trained on in any wording.
    """

    name: str
    test_percent: int = 3
    always_test: frozenset[str] = frozenset()

    @abstractmethod
    def draw(self, rng: Random, level: float) -> P:
        """A random problem of either split; level 0..1 moves easy to full range."""

    @abstractmethod
    def canonical(self, problem: P) -> str: ...

    @abstractmethod
    def question(self, problem: P, rng: Random) -> str: ...

    @abstractmethod
    def thinking(self, problem: P) -> str: ...

    @abstractmethod
    def answer(self, problem: P) -> str: ...

    @abstractmethod
    def check(self, problem: P, text: str) -> bool:
        """Whether `text`, what follows </think>, answers the problem rightly."""

    @abstractmethod
    def expected(self, problem: P) -> dict[str, Any]:
        """What a checker of hybrid_rt/evaluate/answers.py needs to know of the problem, as JSON has it."""

    @abstractmethod
    def easy(self, problem: P) -> bool:
        """Whether a right answer without thinking may be asked of the model."""

    def is_table(self, problem: P) -> bool:
        """Problems so small that every one is a step of larger ones: never held out."""
        return False

    def key(self, problem: P) -> str:
        """What makes two problems of a test set duplicates."""
        return self.canonical(problem)

    def split(self, problem: P) -> Split:
        name = self.canonical(problem)
        if name in self.always_test:
            return "test"
        held_out = not self.is_table(problem) and bucket(name) < self.test_percent
        return "test" if held_out else "train"

    def problem(self, split: Split, rng: Random, level: float = 1.0) -> P:
        """A fresh problem of the split."""
        while True:
            problem = self.draw(rng, level)
            if self.split(problem) == split:
                return problem

    def test_set(self, count: int = 1000, seed: int = 0) -> list[P]:
        """`count` distinct problems of the test split, the same for the same seed."""
        rng = Random(f"{self.name} test {seed}")
        found: dict[str, P] = {}
        while len(found) < count:
            problem = self.problem("test", rng)
            found.setdefault(self.key(problem), problem)
        return list(found.values())


def restyle(text: str, rng: Random) -> str:
    """Vary a question as people do: case, final mark, a word of courtesy."""
    roll = rng.random()
    if roll < 0.55:
        return text
    if roll < 0.75:
        text = text[0].lower() + text[1:]
    elif roll < 0.80:
        text = rng.choice(["Please: ", "Hey, ", "Hi! ", "ok, ", "So "]) + text
    elif roll < 0.83:
        text = text + rng.choice([" Thanks!", " Thank you.", " Please.", " Think step by step."])
    if rng.random() < 0.6:
        text = text.rstrip("?.!")
    return text.rstrip() if rng.random() < 0.9 else text + rng.choice(["?", "??", " ", "\n", "!"])

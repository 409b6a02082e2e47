"""How often a letter occurs in a word."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

from hybrid_rt.evaluate.answers import says_times

from .base import Split, Task, restyle
from .words import LETTERS, english, held_out, train_word


class Count(NamedTuple):
    word: str
    letter: str


WORDINGS = [
    "How many {l}'s are in {w}?",
    "How many {l}'s are there in {w}?",
    "How many {l}'s in {w}?",
    "How many {l}s are in {w}?",
    "How many {l}s in {w}?",
    "How many {l}’s are in {w}?",
    "How many {l} are in {w}?",
    "How many {l} in {w}?",
    "Number of {l}'s in {w}",
    "How many {l}'s does {w} have?",
    "How many {l}'s are in the word {w}?",
    "How many letters {l} are in {w}?",
    "How many times does {l} appear in {w}?",
    "How many times does the letter {l} appear in {w}?",
    "How often does {l} occur in {w}?",
    "How often is the letter {l} in the word {w}?",
    "Count the letter {l} in {w}.",
    "Count the {l}'s in {w}.",
    "Count {l} in {w}.",
    "What is the number of {l}'s in {w}?",
    "In the word {w}, how many {l}'s are there?",
    "{w}: how many {l}'s?",
]


class CountTask(Task[Count]):
    """The split goes by the word alone: a tested word was never spelled in training."""

    name = "count"
    always_test = frozenset({"strawberry"})

    def draw(self, rng: Random, level: float) -> Count:
        word = train_word(rng)
        word = word[: 5 + int(10 * level)]
        return Count(word, self._letter(word, rng))

    @staticmethod
    def _letter(word: str, rng: Random) -> str:
        """Mostly a letter of the word, with a liking for those that repeat."""
        roll = rng.random()
        repeated = [c for c in word if word.count(c) > 1]
        if roll < 0.12:
            return rng.choice(LETTERS)
        return rng.choice(repeated if repeated and roll < 0.6 else word)

    def problem(self, split: Split, rng: Random, level: float = 1.0) -> Count:
        if split == "train":
            return super().problem(split, rng, level)
        word = rng.choice(english()[1])
        return Count(word, self._letter(word, rng))

    def split(self, problem: Count) -> Split:
        return "test" if held_out(problem.word) else "train"

    def canonical(self, problem: Count) -> str:
        return problem.word

    def key(self, problem: Count) -> str:
        return f"{problem.word} {problem.letter}"

    def question(self, problem: Count, rng: Random) -> str:
        word, letter = problem
        roll = rng.random()
        shown = word if roll < 0.75 else word.capitalize() if roll < 0.92 else word.upper()
        before, after = rng.choice([("", "")] * 3 + [('"', '"'), ("'", "'"), ("“", "”")])
        if rng.random() < 0.15:
            letter = letter.upper()
        text = rng.choice(WORDINGS).format(l=letter, w=before + shown + after)
        return restyle(text, rng)

    def thinking(self, problem: Count) -> str:
        """The word copied, then copied again with a running count after each hit."""
        word, letter = problem
        seen, spelled = 0, ""
        for c in word:
            seen += c == letter
            spelled += f"{c}{seen}" if c == letter else c
        return f"{word},{letter}\n{spelled}\n{seen}"

    def answer(self, problem: Count) -> str:
        times = problem.word.count(problem.letter)
        unit = "time" if times == 1 else "times"
        return f'The letter {problem.letter} appears {times} {unit} in "{problem.word}".'

    def check(self, problem: Count, text: str) -> bool:
        return says_times(self.expected(problem), text)

    def expected(self, problem: Count) -> dict[str, Any]:
        return {"times": problem.word.count(problem.letter)}

    def easy(self, problem: Count) -> bool:
        return len(problem.word) <= 4

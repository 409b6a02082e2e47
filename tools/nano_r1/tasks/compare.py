"""Which of two decimals is larger."""

from __future__ import annotations

from decimal import Decimal
from random import Random
from typing import Any, NamedTuple

from hybrid_rt.evaluate.answers import says_comparison

from .base import Task, restyle
from .digits import compare_steps

WHOLE, PLACES = 3, 4  # digits before and after the point in the padded form


class Comparison(NamedTuple):
    a: str
    b: str
    ask: str  # a key of WORDINGS


WORDINGS = {
    "larger": [
        "Which is larger, {a} or {b}?",
        "Which is bigger, {a} or {b}?",
        "Which is greater: {a} or {b}?",
        "Which number is larger, {a} or {b}?",
        "Which number is bigger: {a} or {b}?",
        "What is larger, {a} or {b}?",
        "What is bigger, {a} or {b}?",
        "{a} or {b}, which is larger?",
        "{a} or {b}: which one is bigger?",
        "Compare {a} and {b}.",
        "Which of {a} and {b} is larger?",
        "{a} vs {b}",
        "{a} or {b}?",
        "Which one is larger, {a} or {b}?",
        "Tell me which is larger: {a} or {b}.",
    ],
    "smaller": [
        "Which is smaller, {a} or {b}?",
        "Which is less, {a} or {b}?",
        "Which number is smaller: {a} or {b}?",
        "What is smaller, {a} or {b}?",
        "{a} or {b}, which is smaller?",
        "Which of {a} and {b} is smaller?",
    ],
    "is larger": [
        "Is {a} larger than {b}?",
        "Is {a} bigger than {b}?",
        "Is {a} greater than {b}?",
        "Is {a} more than {b}?",
        "Is {a} > {b}?",
    ],
    "is smaller": [
        "Is {a} smaller than {b}?",
        "Is {a} less than {b}?",
        "Is {a} < {b}?",
    ],
}


def padded(number: str) -> str:
    """`9.11` as `009.1100`: one width for all, so equal places stand at equal positions."""
    whole, _, places = number.partition(".")
    return f"{whole.zfill(WHOLE)}.{places.ljust(PLACES, '0')}"


def digits_of(count: int, rng: Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


class Compare(Task[Comparison]):
    name = "compare"
    always_test = frozenset({"9.11 9.8"})

    def draw(self, rng: Random, level: float) -> Comparison:
        ask = rng.choices(list(WORDINGS), [6, 2, 2, 2])[0]
        whole = str(rng.randrange(10 ** rng.choices([1, 2, 3], [6, 3, 1])[0]))
        first = digits_of(rng.choices([0, 1, 2, 3, 4], [1, 5, 6, 4, 1])[0], rng)
        second = digits_of(rng.choices([0, 1, 2, 3, 4], [1, 5, 6, 4, 1])[0], rng)
        other = whole
        roll = rng.random()
        if roll < 0.25:
            other = str(rng.randrange(10 ** rng.choices([1, 2, 3], [6, 3, 1])[0]))
        elif roll < 0.5:  # a common beginning, so that later places decide
            second = (first[: rng.randint(1, 3)] + second)[:PLACES]
        elif roll < 0.55:  # equal, or equal but for zeros
            second = (first + "0" * rng.randrange(3))[:PLACES]
        numbers = [f"{whole}.{first}".rstrip("."), f"{other}.{second}".rstrip(".")]
        rng.shuffle(numbers)
        return Comparison(numbers[0], numbers[1], ask)

    def canonical(self, problem: Comparison) -> str:
        return " ".join(sorted([problem.a, problem.b]))

    def question(self, problem: Comparison, rng: Random) -> str:
        a, b, ask = problem
        return restyle(rng.choice(WORDINGS[ask]).format(a=a, b=b), rng)

    def thinking(self, problem: Comparison) -> str:
        """Place by place; the last line puts the sign found to what was asked."""
        a, b, ask = problem
        x, y = padded(a), padded(b)
        steps, sign = compare_steps(x.replace(".", ""), y.replace(".", ""))
        wanted = "<" if ask.endswith("smaller") else ">"
        if ask.startswith("is"):
            verdict = "yes" if sign == wanted else "no"
        else:
            verdict = "equal" if sign == "=" else a if sign == wanted else b
        return f"{a} {b}\n{x} {y}\n{steps}\n{a}{sign}{b}\n{ask}? {verdict}"

    def answer(self, problem: Comparison) -> str:
        low, high = sorted([problem.a, problem.b], key=Decimal)
        if Decimal(low) == Decimal(high):
            fact = f"{problem.a} and {problem.b} are equal"
            return f"No, {fact}" if problem.ask.startswith("is") else fact
        if problem.ask.endswith("smaller"):
            first, fact = low, f"{low} is smaller than {high}"
        else:
            first, fact = high, f"{high} is larger than {low}"
        if problem.ask.startswith("is"):
            return f"{'Yes' if problem.a == first else 'No'}, {fact}"
        return fact

    def check(self, problem: Comparison, text: str) -> bool:
        return says_comparison(self.expected(problem), text)

    def expected(self, problem: Comparison) -> dict[str, Any]:
        return problem._asdict()

    def easy(self, problem: Comparison) -> bool:
        (a, _, x), (b, _, y) = problem.a.partition("."), problem.b.partition(".")
        return a != b or len(x) == len(y) == 1

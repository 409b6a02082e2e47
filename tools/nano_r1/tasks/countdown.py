"""Countdown with three numbers: reach a target with +, - and *."""

from __future__ import annotations

import re
from random import Random
from typing import Any, NamedTuple

from hybrid_rt.evaluate.answers import says_expression

from .base import Task, restyle

LARGEST, TOP = 12, 150  # the largest number and the largest target


class Countdown(NamedTuple):
    numbers: tuple[int, int, int]
    target: int


WORDINGS = [
    "Use {a}, {b} and {c} once each with + - x to make {t}.",
    "Use {a}, {b} and {c} once each with +, - and * to make {t}.",
    "Use {a}, {b}, {c} to make {t}.",
    "Use {a}, {b} and {c} to get {t}.",
    "Use the numbers {a}, {b} and {c} to make {t}.",
    "Make {t} from {a}, {b} and {c}.",
    "Make {t} with {a}, {b}, {c}.",
    "Make {t} using {a}, {b} and {c}.",
    "Reach {t} using {a}, {b} and {c}.",
    "Countdown: {a} {b} {c} -> {t}",
    "Countdown: {a}, {b}, {c}, target {t}",
    "Play Countdown: numbers {a}, {b}, {c}, target {t}.",
    "How can I make {t} from {a}, {b} and {c}?",
    "Can you make {t} from {a}, {b} and {c}?",
    "Combine {a}, {b} and {c} to get {t}.",
    "Using {a}, {b} and {c} once each, make {t}.",
    "Get {t} from {a}, {b}, {c} with + - *.",
]


class Move(NamedTuple):
    """Two of the numbers, in falling order, and the one left for the last step."""

    high: int
    low: int
    last: int


def moves(numbers: tuple[int, ...]) -> list[Move]:
    x, y, z = sorted(numbers, reverse=True)
    return [Move(x, y, z), Move(x, z, y), Move(y, z, x)]


def values(move: Move) -> dict[str, int]:
    """What the two numbers of a move give, by sign."""
    high, low, _ = move
    return {"+": high + low, "-": high - low, "*": high * low}


def needs(move: Move, target: int) -> list[tuple[str, int | None, str]]:
    """What the two numbers would have to give: (spelled, value, last step).

    In a last step `v` stands for that value; None means that there is none.
    """
    last = move.last
    if target >= last:
        first = (f"{target}-{last}={target - last}", target - last, f"v+{last}")
    else:
        first = (f"{last}-{target}={last - target}", last - target, f"{last}-v")
    second = (f"{target}+{last}={target + last}", target + last, f"v-{last}")
    if target % last:
        return [first, second, (f"{target}/{last} no", None, "")]
    third = (f"{target}/{last}={target // last}", target // last, f"v*{last}")
    return [first, second, third]


def expression(move: Move, sign: str, last_step: str) -> str:
    inner = f"{move.high}{sign}{move.low}"
    bracket = sign != "*" and ("*" in last_step or last_step.endswith("-v"))
    return last_step.replace("v", f"({inner})" if bracket else inner)


def search(problem: Countdown) -> tuple[list[str], str | None]:
    """The lines of the search and the expression found, or None after all three moves.

    What is needed is put beside each value there is, one pair after the other, with n or y: in one glance over three
    values a small model sees matches that are not there.
    """
    lines = []
    for move in moves(problem.numbers):
        have = values(move)
        line = [f"{move.high}{sign}{move.low}={value}" for sign, value in have.items()]
        for spelled, value, last_step in needs(move, problem.target):
            line.append(spelled)
            for sign, there in have.items() if value is not None else ():
                line.append(f"{value} {there}{'y' if there == value else 'n'}")
                if there == value:
                    lines.append(" ".join(line))
                    return lines, expression(move, sign, last_step)
        lines.append(" ".join(line))
    return lines, None


def spaced(text: str) -> str:
    return re.sub(r"([-+*=])", r" \1 ", text)


class CountdownTask(Task[Countdown]):
    name = "countdown"
    # There are few thousand problems; 3 % of them would not fill a test set.
    test_percent = 12
    always_test = frozenset({"3 7 12 33"})

    def draw(self, rng: Random, level: float) -> Countdown:
        largest = LARGEST if level > 0.6 else 9
        numbers = rng.randint(1, largest), rng.randint(1, largest), rng.randint(1, largest)
        if rng.random() < 0.04:  # mostly without a solution
            return Countdown(numbers, rng.randint(10, 100))
        while True:
            move = rng.choice(moves(numbers))
            value = rng.choice([*values(move).values()])
            last = move.last
            target = rng.choice([value + last, value - last, last - value, value * last])
            if 1 <= target <= TOP:
                return Countdown(numbers, target)

    def canonical(self, problem: Countdown) -> str:
        return " ".join(map(str, [*sorted(problem.numbers), problem.target]))

    def question(self, problem: Countdown, rng: Random) -> str:
        a, b, c = problem.numbers
        return restyle(rng.choice(WORDINGS).format(a=a, b=b, c=c, t=problem.target), rng)

    def thinking(self, problem: Countdown) -> str:
        lines, found = search(problem)
        x, y, z = sorted(problem.numbers, reverse=True)
        end = f"{found}={problem.target}" if found else "none"
        return "\n".join([f"{x} {y} {z} {problem.target}", *lines, end])

    def answer(self, problem: Countdown) -> str:
        _, found = search(problem)
        if found:
            return spaced(f"{found}={problem.target}")
        a, b, c = problem.numbers
        return f"There is no way to make {problem.target} from {a}, {b} and {c}."

    def check(self, problem: Countdown, text: str) -> bool:
        return says_expression(self.expected(problem), text)

    def expected(self, problem: Countdown) -> dict[str, Any]:
        return {**problem._asdict(), "solvable": search(problem)[1] is not None}

    def easy(self, problem: Countdown) -> bool:
        return sum(problem.numbers) == problem.target

"""Addition, subtraction and multiplication of whole numbers."""

from __future__ import annotations

from random import Random
from typing import Any

from hybrid_rt.evaluate.answers import says_result

from .base import Task, restyle
from .digits import add_text, reverse, row_steps, subtract_text, unreverse

Pair = tuple[int, int]

PLAIN = [
    "What is {a} {op} {b}?",
    "What is {a}{op}{b}?",
    "What's {a} {op} {b}?",
    "{a} {op} {b} = ?",
    "{a} {op} {b} =",
    "{a}{op}{b}=?",
    "{a} {op} {b}",
    "{a}{op}{b}",
    "Compute {a} {op} {b}.",
    "Calculate {a} {op} {b}.",
    "How much is {a} {op} {b}?",
    "Can you compute {a} {op} {b}?",
    "Tell me what {a} {op} {b} is.",
    "Solve {a} {op} {b}.",
    "What does {a} {op} {b} equal?",
    "I need the result of {a} {op} {b}.",
]


def number_of(digits: int, rng: Random) -> int:
    """A number of exactly that many digits (0..9 for one)."""
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


class Arithmetic(Task[Pair]):
    """Two whole numbers and one sign."""

    sign: str
    signs: list[str]  # as people write it
    spoken: list[str]
    widths: list[int]  # relative frequency of operands of 1, 2, ... digits
    no_think_digits: int  # easy up to this many digits in all

    def draw(self, rng: Random, level: float) -> Pair:
        top = max(2, round(level * len(self.widths)))
        sizes = rng.choices(range(1, top + 1), self.widths[:top], k=2)
        return number_of(sizes[0], rng), number_of(sizes[1], rng)

    def is_table(self, problem: Pair) -> bool:
        return max(problem) < 10

    def easy(self, problem: Pair) -> bool:
        return len(f"{problem[0]}{problem[1]}") <= self.no_think_digits

    def question(self, problem: Pair, rng: Random) -> str:
        a, b = problem
        if rng.random() < 0.6:
            text = rng.choice(PLAIN).format(a=a, b=b, op=rng.choice(self.signs))
        else:
            text = rng.choice(self.spoken).format(a=a, b=b)
        return restyle(text, rng)

    def canonical(self, problem: Pair) -> str:
        low, high = sorted(problem)
        return f"{low}{self.sign}{high}"

    def result(self, problem: Pair) -> int:
        a, b = problem
        return {"+": a + b, "-": a - b, "*": a * b}[self.sign]

    def answer(self, problem: Pair) -> str:
        a, b = problem
        return f"{a} {self.sign} {b} = {self.result(problem)}"

    def check(self, problem: Pair, text: str) -> bool:
        return says_result(self.expected(problem), text)

    def expected(self, problem: Pair) -> dict[str, Any]:
        return {"result": self.result(problem)}


class Add(Arithmetic):
    name, sign, signs = "add", "+", ["+"]
    widths, no_think_digits = [2, 4, 4, 4, 2], 3
    spoken = [
        "Add {a} and {b}.",
        "Add {a} to {b}.",
        "What is {a} plus {b}?",
        "{a} plus {b}",
        "How much is {a} plus {b}?",
        "What is the sum of {a} and {b}?",
        "Find the sum of {a} and {b}.",
        "Sum {a} and {b}.",
        "What do you get if you add {a} and {b}?",
        "I have {a} apples and get {b} more. How many apples do I have?",
    ]

    def thinking(self, problem: Pair) -> str:
        """The question's numbers as they stand, then reversed: copying and turning round are two steps."""
        a, b = problem
        lines, total = add_text(reverse(a), reverse(b))
        return f"{a}+{b}\n{lines}\n{unreverse(total)}"


class Subtract(Arithmetic):
    name, sign, signs = "subtract", "-", ["-", "-", "-", "−"]
    widths, no_think_digits = [2, 4, 4, 4, 2], 3
    spoken = [
        "Subtract {b} from {a}.",
        "What is {a} minus {b}?",
        "{a} minus {b}",
        "How much is {a} minus {b}?",
        "Take {b} away from {a}.",
        "What is the difference of {a} and {b}?",
        "What is left if you take {b} from {a}?",
        "Compute {a} minus {b}.",
        "What do you get if you subtract {b} from {a}?",
        "I have {a} apples and give away {b}. How many apples are left?",
    ]

    def draw(self, rng: Random, level: float) -> Pair:
        a, b = super().draw(rng, level)
        # People mostly take the smaller number away; a third stay as drawn.
        return (a, b) if rng.random() < 0.35 else (max(a, b), min(a, b))

    def thinking(self, problem: Pair) -> str:
        """Digit by digit from the right; where a borrow is left over, the other way round, and the sign turned."""
        a, b = problem
        lines, rest, borrow = subtract_text(reverse(a), reverse(b))
        if not borrow:
            return f"{a}-{b}\n{lines}\n{unreverse(rest)}"
        swapped, rest, _ = subtract_text(reverse(b), reverse(a))
        return f"{a}-{b}\n{lines}\nswap\n{b}-{a}\n{swapped}\n-{unreverse(rest)}"


class Multiply(Arithmetic):
    name, sign, signs = "multiply", "*", ["*", "*", "*", "×", "x"]
    always_test = frozenset({"36*47"})
    widths, no_think_digits = [2, 4, 4], 2
    spoken = [
        "Multiply {a} by {b}.",
        "Multiply {a} and {b}.",
        "What is {a} times {b}?",
        "{a} times {b}",
        "How much is {a} times {b}?",
        "What is the product of {a} and {b}?",
        "Find the product of {a} and {b}.",
        "What do you get if you multiply {a} by {b}?",
        "Compute {a} times {b}.",
        "There are {a} boxes with {b} apples each. How many apples are there?",
    ]

    def thinking(self, problem: Pair) -> str:
        """A partial product for each digit of the second number, summed as they come."""
        x, y = map(reverse, problem)
        lines, total = ["{}*{}".format(*problem), f"{x}*{y}"], ""
        for shift, digit in enumerate(y):
            steps, row = row_steps(x, digit)
            row = "0" * shift + row
            lines += [steps, row]
            if shift:
                addition, row = add_text(total, row)
                lines.append(addition)
            total = row
        return "\n".join([*lines, unreverse(total)])

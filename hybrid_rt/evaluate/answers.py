"""Whether an answer to one of nano-r1's problems is right: what it says after its thinking against what is expected.

A checker gets `expected`, the fields of a problem in nano_problems.jsonl, and the text of the answer.
"""

import ast
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

Expected = Mapping[str, Any]
MAX_EXPRESSION = 200  # characters; longer ones are no answers, and deep ones would take the parser's stack


def says_result(expected: Expected, text: str) -> bool:
    """result: a whole number. The first number after an equals sign counts."""
    said = re.search(r"= *(-?\d{1,30})(?!\d)", text)
    return said is not None and int(said[1]) == expected["result"]


def says_times(expected: Expected, text: str) -> bool:
    """times: how often a letter comes."""
    said = re.search(r"(?<!\d)(\d{1,9}) times?", text)
    return said is not None and int(said[1]) == expected["times"]


def says_comparison(expected: Expected, text: str) -> bool:
    """a, b: decimals. ask: "larger" or "smaller", or "is larger" or "is smaller" where yes or no is asked for."""
    a, b = Decimal(expected["a"]), Decimal(expected["b"])
    said = re.search(r"([\d.]*\d) is (larger|smaller) than ([\d.]*\d)", text)
    if a == b or not said:
        return a == b and "are equal" in text
    first, word, second = said.groups()
    if {first, second} != {expected["a"], expected["b"]}:
        return False
    if expected["ask"].startswith("is"):
        holds = a > b if expected["ask"] == "is larger" else a < b
        if ("yes" in text.lower()) != holds:
            return False
    larger = Decimal(first) > Decimal(second)
    return larger == (word == "larger")


def says_expression(expected: Expected, text: str) -> bool:
    """numbers: each to be used once. target: what they are to make. solvable: whether they can."""
    if not expected["solvable"]:
        return "no way" in text
    said = re.search(r"([-+*()\d ]+)=", text)
    if not said or len(said[1]) > MAX_EXPRESSION:
        return False
    if sorted(map(int, re.findall(r"\d+", said[1]))) != sorted(expected["numbers"]):
        return False
    try:
        return _value(ast.parse(said[1].strip(), mode="eval").body) == expected["target"]
    except (SyntaxError, ValueError):
        return False


def _value(node: ast.expr) -> int:
    """The value of an expression of whole numbers with + - * only; ValueError else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
        x, y = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Mult):
            return x * y
        return x + y if isinstance(node.op, ast.Add) else x - y
    raise ValueError("not an expression of + - *")


CHECKS: dict[str, Callable[[Expected, str], bool]] = {
    "add": says_result,
    "subtract": says_result,
    "multiply": says_result,
    "compare": says_comparison,
    "count": says_times,
    "countdown": says_expression,
}

"""The spelled-out arithmetic that the tasks share.

Numbers are worked on from the right, so they are written reversed: 876 is
"678". Every step stands alone: the digits it needs, then its result.
"""

from __future__ import annotations


def reverse(number: int) -> str:
    return str(number)[::-1]


def unreverse(digits: str) -> str:
    """The number that reversed digits mean, without leading zeros."""
    return digits[::-1].lstrip("0") or "0"


def add_steps(x: str, y: str) -> tuple[str, str]:
    """Add two reversed numbers of equal length.

    Returns the steps `x+y+carry=CD` (C the carry out, D the digit) and the
    reversed sum.
    """
    carry, steps, digits = 0, [], ""
    for p, q in zip(x, y, strict=True):
        total = int(p) + int(q) + carry
        steps.append(f"{p}+{q}+{carry}={total:02}")
        carry, digits = total // 10, digits + str(total % 10)
    return " ".join(steps), digits + ("1" if carry else "")


def subtract_steps(x: str, y: str) -> tuple[str, str, int]:
    """Subtract reversed y from reversed x, both of one length.

    The steps are `x-y-borrow=BD`: B the borrow for the next step, D the digit.
    The last borrow is 1 where y was the larger; the digits mean nothing then.
    """
    borrow, steps, digits = 0, [], ""
    for p, q in zip(x, y, strict=True):
        rest = int(p) - int(q) - borrow
        steps.append(f"{p}-{q}-{borrow}={int(rest < 0)}{rest % 10}")
        borrow, digits = int(rest < 0), digits + str(rest % 10)
    return " ".join(steps), digits, borrow


def row_steps(x: str, digit: str) -> tuple[str, str]:
    """Multiply reversed x by one digit; the steps are `x*digit+carry=CD`."""
    carry, steps, digits = 0, [], ""
    for p in x:
        total = int(p) * int(digit) + carry
        steps.append(f"{p}*{digit}+{carry}={total:02}")
        carry, digits = total // 10, digits + str(total % 10)
    return " ".join(steps), digits + (str(carry) if carry else "")


def compare_steps(x: str, y: str) -> tuple[str, str]:
    """Compare two strings of digits of one length from the left.

    The steps are `p=q` up to the first difference, `p<q` or `p>q`. Returns
    them and the last sign.
    """
    steps, sign = [], "="
    for p, q in zip(x, y, strict=True):
        sign = "=" if p == q else "<" if p < q else ">"
        steps.append(f"{p}{sign}{q}")
        if sign != "=":
            break
    return " ".join(steps), sign


def add_text(x: str, y: str) -> tuple[str, str]:
    """The lines of an addition of reversed numbers, and the reversed sum."""
    width = max(len(x), len(y))
    x, y = x.ljust(width, "0"), y.ljust(width, "0")
    steps, total = add_steps(x, y)
    return f"{x}+{y}\n{steps}\n{total}", total


def subtract_text(x: str, y: str) -> tuple[str, str, int]:
    """The lines of a subtraction of reversed numbers, the reversed difference, and what `subtract_steps` borrowed."""
    width = max(len(x), len(y))
    x, y = x.ljust(width, "0"), y.ljust(width, "0")
    steps, rest, borrow = subtract_steps(x, y)
    return f"{x}-{y}\n{steps}" + ("" if borrow else f"\n{rest}"), rest, borrow

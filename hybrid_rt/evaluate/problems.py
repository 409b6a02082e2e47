"""The held-out problems of nano-r1's tasks, which ship with it: tools/nano_r1/problems.py writes them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_rt.evaluate.answers import CHECKS
from quant.errors import UsageError

FILE = Path(__file__).parent.parent / "nano_problems.jsonl"
MOST = 1000  # of each task


@dataclass(frozen=True)
class Problem:
    """A question as a user would put it. expected: what the task's checker needs to know."""

    task: str
    question: str
    expected: Mapping[str, Any]

    def solved_by(self, answer: str) -> bool:
        """Whether what was said after the thinking is right."""
        return CHECKS[self.task](self.expected, answer)


def held_out_problems(count: int = MOST) -> dict[str, list[Problem]]:
    """The first `count` problems of each task. Raises UsageError for more than there are."""
    if not 2 <= count <= MOST:
        raise UsageError(f"there are {MOST} problems for each task, not {count}; give --problems from 2 to {MOST}")
    tasks: dict[str, list[Problem]] = {name: [] for name in CHECKS}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        problem = Problem(**json.loads(line))
        if len(tasks[problem.task]) < count:
            tasks[problem.task].append(problem)
    return tasks

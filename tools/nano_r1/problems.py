"""Write the held-out problems that ship for `dsr1 eval --tasks`, 1,000 a task.

python -m tools.nano_r1.problems hybrid_rt/nano_problems.jsonl
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tools.nano_r1.tasks import TASKS

PROBLEMS, SEED = 1000, 0


def lines() -> Iterator[str]:
    """One JSON object a problem: the task, the question in a random wording, and what a checker expects."""
    for name, task in TASKS.items():
        rng = Random(f"{name} wording {SEED}")
        for problem in task.test_set(PROBLEMS, SEED):
            fields = {"task": name, "question": task.question(problem, rng), "expected": task.expected(problem)}
            yield json.dumps(fields, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("".join(lines()), encoding="utf-8")

"""A text to calibrate nano-r1 with: problems of its tasks as it was trained on, thought through and answered.

python -m tools.formats.calibration_text FILE [--problems 100]
"""

import argparse
from pathlib import Path
from random import Random

from hybrid_rt.evaluate.text import render
from hybrid_rt.models import NANO_R1
from hybrid_rt.tokenizer import Tokenizer
from tools.nano_r1.tasks import TASKS

SEED = 1


def calibration_text(problems: int) -> str:
    """So many problems of each task from the split that is trained on, in any order, as nano-r1's chats."""
    tokenizer, documents = Tokenizer.load(NANO_R1), []
    for name, task in TASKS.items():
        rng = Random(f"{name} train {SEED}")
        for _ in range(problems):
            problem = task.problem("train", rng)
            thought = f"<think>\n{task.thinking(problem)}\n</think>\n\n{task.answer(problem)}"
            documents.append(render(task.question(problem, rng).strip(), thought, tokenizer))
    Random(SEED).shuffle(documents)
    return "".join(documents)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--problems", type=int, default=100, help="of each task")
    told = parser.parse_args()
    told.file.write_text(calibration_text(told.problems), encoding="utf-8")

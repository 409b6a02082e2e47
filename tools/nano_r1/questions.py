"""hybrid_rt/evaluate/nano_questions.jsonl: held-out problems whose answers end with a number.

python -m tools.nano_r1.questions
"""

import json
from random import Random

from hybrid_rt.evaluate.questions import NUMBER, SHIPPED
from tools.nano_r1.tasks import TASKS

NAMES = ("add", "subtract", "multiply", "count")
EACH = 25
SEED = 7


def main() -> None:
    lines = []
    for name in NAMES:
        task, wording = TASKS[name], Random(f"{name} wording {SEED}")
        for problem in task.test_set(EACH, SEED):
            answer = NUMBER.findall(task.answer(problem))[-1]
            lines.append(json.dumps({"question": task.question(problem, wording), "answer": answer}))
    SHIPPED.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Questions whose answers are numbers: a file of JSON objects, one a line, with `question` and `answer`.

nano_questions.jsonl ships with nano-r1: 25 held-out problems each of adding, subtracting, multiplying and counting
letters (tools/nano_r1/questions.py writes it).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from quant.errors import Dsr1Error
from quant.json_object import parse_json_object

SHIPPED = Path(__file__).parent / "nano_questions.jsonl"
MAX_BYTES = 64 << 20
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class NumberQuestion:
    """A question as a user would put it, and the number that its answer has to end with."""

    question: str
    answer: str

    def solved_by(self, answer: str) -> bool:
        """Whether the last number of what was said is the right one; "1,692" counts as 1692."""
        said = NUMBER.findall(answer.replace(",", ""))
        return bool(said) and said[-1] == self.answer


def read_questions(path: Path | None) -> list[NumberQuestion]:
    """The questions of a file, by default those of nano-r1. Raises Dsr1Error if it is no such file."""
    path = path or SHIPPED
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Dsr1Error(f"{path} is larger than {MAX_BYTES >> 20} MiB; give a shorter file")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise Dsr1Error(f"{path} cannot be read ({error.strerror}); give a file of questions") from None
    questions = [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise Dsr1Error(f"{path} has no questions; give one JSON object a line, with question and answer")
    return questions


def _parse(path: Path, number: int, line: bytes) -> NumberQuestion:
    try:
        fields = parse_json_object(line)
    except ValueError:
        fields = {}
    question, answer = fields.get("question"), fields.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or not NUMBER.fullmatch(answer):
        raise Dsr1Error(
            f'line {number} of {path} is not such as {{"question": "What is 2 + 2?", "answer": "4"}}; mend or remove it'
        )
    return NumberQuestion(question, answer)

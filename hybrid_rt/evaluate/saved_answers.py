"""What a model made of nano-r1's problems, in a file, so that it answers once for many comparisons.

A JSON object: format, version, model, problems (SHA-256 of the file that they come from), and under tasks, of each
task, solved ("1" or "0" for each problem, in their order) and tokens (mean of an answer).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_rt.evaluate.problems import FILE, Problem
from hybrid_rt.evaluate.tasks import Answers
from quant.errors import Dsr1Error
from quant.files import new_file
from quant.json_object import parse_json_object

FORMAT, VERSION = "dsr1-answers", 1
MOST_BYTES = 1 << 20
REMEDY = "make it again with --tasks --save-reference"


def save_answers(path: Path, model: str, answers: Mapping[str, Answers]) -> None:
    """Write what `model` made of each task. Raises StoreError when the disk refuses."""
    tasks = {
        task: {"solved": "".join("01"[solved] for solved in of_task.solved), "tokens": of_task.tokens}
        for task, of_task in answers.items()
    }
    told = {"format": FORMAT, "version": VERSION, "model": model, "problems": _fingerprint(), "tasks": tasks}
    with new_file(path) as file:
        file.write(json.dumps(told, indent=1).encode() + b"\n")


def read_answers(path: Path, problems: Mapping[str, Sequence[Problem]]) -> dict[str, Answers]:
    """What `save_answers` wrote, of `problems`. Raises Dsr1Error for other files, or other or fewer problems."""
    told = _read(path)
    if told.get("format") != FORMAT or told.get("version") != VERSION:
        raise Dsr1Error(f"{path} is no file of a model's answers that this dsr1 reads; {REMEDY}")
    if told.get("problems") != _fingerprint():
        raise Dsr1Error(f"{path} is of other problems than this dsr1 has; {REMEDY}")
    try:
        found = {task: _answers(told["tasks"][task]) for task in problems}
    except (KeyError, TypeError, ValueError):
        raise Dsr1Error(f"{path} is damaged; {REMEDY}") from None
    for task, some in problems.items():
        if len(found[task].solved) < len(some):
            raise Dsr1Error(
                f"{path} has answers to {len(found[task].solved)} problems of {task!r}, not {len(some)}; give "
                f"--problems {len(found[task].solved)}, or {REMEDY}"
            )
    return {task: Answers(found[task].solved[: len(some)], found[task].tokens) for task, some in problems.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError("it is too large")
        return parse_json_object(text)
    except FileNotFoundError:
        raise Dsr1Error(f"there is no file {path}; {REMEDY.replace('again ', '')}") from None
    except OSError as error:
        raise Dsr1Error(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise Dsr1Error(f"{path} is no file of a model's answers ({error}); {REMEDY}") from None


def _answers(told: Mapping[str, Any]) -> Answers:
    """Raises KeyError, TypeError or ValueError for anything else than `save_answers` writes."""
    solved, tokens = told["solved"], told["tokens"]
    if not isinstance(solved, str) or set(solved) - {"0", "1"} or len(solved) < 2 or not isinstance(tokens, float):
        raise ValueError("no answers")
    return Answers(tuple(one == "1" for one in solved), tokens)


def _fingerprint() -> str:
    return hashlib.sha256(FILE.read_bytes()).hexdigest()

"""One finding of `dsr1 doctor`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "attention", "problem"]
VERDICTS: tuple[Verdict, ...] = ("ok", "attention", "problem")  # the best first


@dataclass(frozen=True)
class Check:
    """value: what was found. remedy: what to do about it and what that gains; empty where all is well."""

    name: str
    value: str
    verdict: Verdict = "ok"
    remedy: str = ""


def worst(checks: Iterable[Check]) -> Verdict:
    """What the checks amount to."""
    return max((check.verdict for check in checks), key=VERDICTS.index, default="ok")


def read_text(path: Path) -> str:
    """A file of /proc or /sys; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""

"""`dsr1 doctor`: what this machine has and what that means for dsr1, with a remedy for each thing that is amiss."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from offload.checks.check import Check, worst
from offload.doctor import examine
from quant.errors import UsageError

STYLES = {"ok": "green", "attention": "yellow", "problem": "bold red"}


def doctor(as_json: bool = False, measure: bool = False, model: str | None = None) -> bool:
    """Print all checks. Returns whether none of them is a problem, for the exit status.

    measure: whether to measure how fast RAM and a disk are read, too. model: what lies on the disk. Raises UsageError
    for a model without measuring, and Dsr1Error if there is no such model.
    """
    checks = examine(measure=measure, model=_folder(model, measure))
    verdict = worst(checks)
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks], "verdict": verdict}))
    else:
        show(checks, Console(soft_wrap=True))
    return verdict != "problem"


def _folder(model: str | None, measure: bool) -> Path | None:
    """The folder of the model that was named."""
    if model is None:
        return None
    if not measure:
        raise UsageError(f"doctor looks at a model's disk only to measure it; give `dsr1 doctor --measure {model}`")
    from hybrid_rt.models import resolve_model

    return resolve_model(model, None, [])


def show(checks: list[Check], console: Console) -> None:
    """A line for each check, and one for each remedy."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = (f"{check.verdict:9}", STYLES[check.verdict])
        console.print(Text.assemble(verdict, f"  {check.name:{width}}  {check.value}"))
        if check.remedy:
            console.print(Text(f"{'':9}  {'':{width}}  -> {check.remedy}"))

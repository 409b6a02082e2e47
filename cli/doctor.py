"""`dsr1 doctor`: what this machine has and what that means for dsr1, with a remedy for each thing that is amiss."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from offload.checks.check import Check, worst
from offload.doctor import examine

STYLES = {"ok": "green", "attention": "yellow", "problem": "bold red"}


def doctor(as_json: bool = False, measure: bool = False) -> bool:
    """Print all checks. Returns whether none of them is a problem, for the exit status.

    measure: whether to measure how fast RAM is read, too.
    """
    checks = examine(measure=measure)
    verdict = worst(checks)
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks], "verdict": verdict}))
    else:
        show(checks, Console(soft_wrap=True))
    return verdict != "problem"


def show(checks: list[Check], console: Console) -> None:
    """A line for each check, and one for each remedy."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = (f"{check.verdict:9}", STYLES[check.verdict])
        console.print(Text.assemble(verdict, f"  {check.name:{width}}  {check.value}"))
        if check.remedy:
            console.print(Text(f"{'':9}  {'':{width}}  -> {check.remedy}"))

"""`dsr1 eval`: how well a model predicts a text, and how far it is from the model that it was made from."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from cli.compiling import show_compiling
from cli.escape import say
from hybrid_rt.engine import Engine
from hybrid_rt.evaluate.evaluation import (
    Comparison,
    Evaluation,
    Report,
    evaluate,
    evaluate_and_save,
    evaluate_saved,
    ignore,
)
from hybrid_rt.evaluate.problems import MOST, Problem, held_out_problems
from hybrid_rt.evaluate.saved_answers import read_answers, save_answers
from hybrid_rt.evaluate.saved_reference import SavedReference
from hybrid_rt.evaluate.statistics import Estimate
from hybrid_rt.evaluate.tasks import Answers, TaskScore, answer_all, compare_answers
from hybrid_rt.evaluate.text import find_text
from quant.errors import UsageError


@dataclass(frozen=True)
class EvalOptions:
    """What the user asked of `dsr1 eval`; None means a default. One of against and reference, and what it is for."""

    against: str | None = None
    text: str | None = None
    reference: Path | None = None
    save_reference: Path | None = None
    tasks: bool = False
    problems: int = MOST
    window: int | None = None
    context: int | None = None
    threads: int | None = None
    dtype: str = "bfloat16"
    as_json: bool = False
    defer_experts: int | None = None

    def check(self) -> None:
        """Raise UsageError for options that exclude each other."""
        given: dict[str, object] = {
            "--against": self.against,
            "--text": self.text,
            "--reference": self.reference,
            "--save-reference": self.save_reference,
            "--window": self.window,
        }
        excluded = {
            "--reference": {"--against", "--text", "--save-reference", "--window"},
            "--save-reference": {"--against"},
        }
        if self.tasks:
            given |= {"--tasks": True, "--defer-experts": self.defer_experts}
            excluded["--tasks"] = {"--text", "--window", "--defer-experts"}
        for option, others in excluded.items():
            clashing = [name for name in others if given[option] is not None and given.get(name) is not None]
            if clashing:
                raise UsageError(f"{option} and {min(clashing)} cannot be given together; leave one out")


def measure(model: str, options: EvalOptions) -> None:
    """Print how well `model` predicts a text or solves tasks, and how far it is from a reference."""
    options.check()
    if options.tasks:
        measure_tasks(model, options)
        return
    with shown_progress("windows") as report:
        found = evaluate_model(model, options, report)
    if options.as_json:
        told = {
            "model": model,
            "against": options.against,
            "text": options.text,
            "dtype": options.dtype,
            "defer_experts": options.defer_experts,
            "reference": None if options.reference is None else str(options.reference),
        }
        print(json.dumps(told | asdict(found)))
    else:
        show(found, Console(highlight=False, markup=False))


def evaluate_model(model: str, options: EvalOptions, report: Report) -> Evaluation:
    """The figures of `model` on a text, alone or beside a reference."""
    if options.reference is not None:
        saved = SavedReference.open(options.reference.expanduser())
        return evaluate_saved(load(model, options, options.defer_experts), saved, report)
    content = find_text(options.text, model, options.against)  # before a model is loaded
    engine = load(model, options, options.defer_experts)
    if options.save_reference is not None:
        return evaluate_and_save(engine, content, options.save_reference.expanduser(), options.window, report)
    reference = None if options.against is None else load(options.against, options)
    return evaluate(engine, content, options.window, reference, report)


def measure_tasks(model: str, options: EvalOptions) -> None:
    """Print how many of nano-r1's problems `model` solves, beside another model on the same ones."""
    problems = held_out_problems(options.problems)
    saved = None if options.reference is None else read_answers(options.reference.expanduser(), problems)
    answers = solve(model, problems, options)
    if options.save_reference is not None:
        save_answers(options.save_reference.expanduser(), model, answers)
    if options.against is not None:
        saved = solve(options.against, problems, options)
    scores = compare_answers(answers, saved)
    if options.as_json:
        told = {"model": model, "against": options.against, "dtype": options.dtype}
        told["reference"] = None if options.reference is None else str(options.reference)
        print(json.dumps(told | {"tasks": {task: asdict(score) for task, score in scores.items()}}))
    else:
        show_tasks(scores, Console(highlight=False, markup=False))


def solve(model: str, problems: Mapping[str, Sequence[Problem]], options: EvalOptions) -> dict[str, Answers]:
    """What one model makes of the problems."""
    engine = load(model, options)
    with shown_progress("problems") as report:
        return answer_all(engine, problems, report)


def load(model: str, options: EvalOptions, defer_experts: int | None = None) -> Engine:
    """The engine of one model; what the user should know about it goes to standard error."""
    # mapped: two models at a time need not be in RAM as a whole
    engine = Engine.load(
        model,
        context=options.context,
        threads=options.threads,
        dtype=options.dtype,
        residency="mapped",
        defer_experts=defer_experts,
        compiling=show_compiling,
    )
    for note in engine.notes:
        say(f"{model}: {note}")
    return engine


@contextmanager
def shown_progress(what: str) -> Iterator[Report]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield ignore
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(found: Evaluation, console: Console) -> None:
    """The figures as a table."""
    table = Table(box=None, pad_edge=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval")
    for name, value, interval in rows(found):
        table.add_row(name, value, interval)
    console.print(table)
    if found.comparison is not None and found.comparison.tail_mass:
        console.print(
            f"The reference tells its likeliest tokens apart; others had {100 * found.comparison.tail_mass:.3g} % "
            "of its probability. The KL divergence counts these as one, so it is a lower bound.",
            soft_wrap=True,
        )
    console.print(
        f"{found.tokens} tokens scored: the second halves of {found.windows} windows of up to {found.window} tokens.",
        soft_wrap=True,
    )


def rows(found: Evaluation) -> list[tuple[str, str, str]]:
    """Name, value and interval of each figure."""
    first = [row("perplexity", found.perplexity), row("negative log likelihood (nll), nats", found.nll)]
    return first if found.comparison is None else first + comparison_rows(found.comparison)


def comparison_rows(found: Comparison) -> list[tuple[str, str, str]]:
    """As `rows`, of what was measured against a reference."""
    return [
        row("perplexity of the reference", found.reference_perplexity),
        row("nll less that of the reference", found.nll_difference),
        row("KL divergence, nats: mean", found.kl),
        ("  median", f"{found.kl_median:.5g}", ""),
        ("  90 % of tokens below", f"{found.kl_90:.5g}", ""),
        ("  99 % of tokens below", f"{found.kl_99:.5g}", ""),
        ("  most", f"{found.kl_max:.5g}", ""),
        row("same likeliest token, %", found.agreement, scale=100),
    ]


def row(name: str, figure: Estimate, scale: float = 1) -> tuple[str, str, str]:
    value, low, high = (f"{scale * number:.5g}" for number in (figure.value, figure.low, figure.high))
    return name, value, f"{low} to {high}"


def show_tasks(scores: dict[str, TaskScore], console: Console) -> None:
    """Accuracy by task; beside a reference, what only one of the two solves, and whether chance explains that."""
    paired = any(score.pairs is not None for score in scores.values())
    table = Table(box=None, pad_edge=False)
    table.add_column("task")
    headings = ["solved, %", "95 % interval", "tokens an answer"]
    headings += ["reference, %", "difference", "95 % interval", "only this", "only reference", "p"] if paired else []
    for heading in headings:
        table.add_column(heading, justify="right")
    for task, score in scores.items():
        table.add_row(task, *task_row(score))
    console.print(table)
    count = next(iter(scores.values())).problems
    console.print(f"{count} held-out problems a task, answered greedily.", soft_wrap=True)
    if paired:
        console.print("p: how likely so uneven a split of the pairs would be if neither were better (McNemar, exact).")


def task_row(score: TaskScore) -> list[str]:
    _, value, interval = row("", score.accuracy, scale=100)
    cells = [value, interval, f"{score.tokens:.0f}"]
    if score.pairs is None or score.reference is None:
        return cells
    _, difference, likely = row("", score.pairs.difference, scale=100)
    pairs = [str(score.pairs.only_model), str(score.pairs.only_reference), f"{score.pairs.p_value:.2g}"]
    return [*cells, f"{100 * score.reference.value:.5g}", difference, likely, *pairs]

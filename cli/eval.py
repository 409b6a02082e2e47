"""`dsr1 eval`: how well a model predicts a text, and how far it is from the model that it was made from."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from cli.compiling import show_compiling
from cli.escape import say
from hybrid_rt.engine import Engine
from hybrid_rt.evaluate.evaluation import Comparison, Evaluation, Report, evaluate, ignore
from hybrid_rt.evaluate.statistics import Estimate
from hybrid_rt.evaluate.text import find_text


def measure(
    model: str,
    against: str | None = None,
    text: str | None = None,
    window: int | None = None,
    context: int | None = None,
    threads: int | None = None,
    dtype: str = "bfloat16",
    as_json: bool = False,
) -> None:
    """Print how well `model` predicts the file `text`, and how far it is from the model `against`."""
    content = find_text(text, model, against)  # before a model is loaded
    engine = load(model, context, threads, dtype)
    reference = None if against is None else load(against, context, threads, dtype)
    with shown_progress() as report:
        found = evaluate(engine, content, window, reference, report)
    if as_json:
        print(json.dumps({"model": model, "against": against, "text": text, "dtype": dtype, **asdict(found)}))
    else:
        show(found, Console(highlight=False, markup=False))


def load(model: str, context: int | None, threads: int | None, dtype: str) -> Engine:
    """The engine of one model; what the user should know about it goes to standard error."""
    # mapped: two models at a time need not be in RAM as a whole
    engine = Engine.load(
        model, context=context, threads=threads, dtype=dtype, residency="mapped", compiling=show_compiling
    )
    for note in engine.notes:
        say(f"{model}: {note}")
    return engine


@contextmanager
def shown_progress() -> Iterator[Report]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield ignore
        return
    columns = (TextColumn("windows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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

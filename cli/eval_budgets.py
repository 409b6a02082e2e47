"""`dsr1 eval --budgets LIST`: accuracy against the budget of thinking, as a table and a plot."""

import json
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli.eval import EvalOptions, load, shown_progress
from hybrid_rt.evaluate.budgets import BudgetPoint, measure_budgets
from hybrid_rt.evaluate.questions import read_questions
from quant.errors import UsageError


@dataclass(frozen=True)
class BudgetOptions:
    """What the user asked of `dsr1 eval --budgets`; None means a default."""

    budgets: str
    questions: Path | None = None
    plot: Path | None = None
    context: int | None = None
    threads: int | None = None
    dtype: str = "bfloat16"
    as_json: bool = False
    defer_experts: int | None = None


def measure_thinking(model: str, options: BudgetOptions) -> None:
    """Answer questions at each budget; print what came of it, and draw it if asked to."""
    budgets, questions = parse_budgets(options.budgets), read_questions(options.questions)  # before a model is loaded
    if options.plot is not None:
        check_plot(options.plot)
    loading = EvalOptions(context=options.context, threads=options.threads, dtype=options.dtype)
    engine = load(model, loading, options.defer_experts)
    with shown_progress("questions") as report:
        points = measure_budgets(engine, questions, budgets, report)
    tell_budgets(model, points, options.as_json)
    if options.plot is not None:
        plot_budgets(model, points, options.plot)


def parse_budgets(text: str) -> list[int | None]:
    """Budgets as "0,32,64,none". Raises UsageError."""
    try:
        return [None if part.strip() == "none" else _count(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--budgets {text} is not a list of numbers of tokens, such as 0,32,64,none") from None


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def tell_budgets(model: str, points: list[BudgetPoint], as_json: bool) -> None:
    """Print the points."""
    if as_json:
        print(json.dumps({"model": model, "budgets": [asdict(point) for point in points]}))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("most thinking", "solved, %", "95 % interval", "tokens thought"):
        table.add_column(heading, justify="right")
    for point in points:
        value, low, high = (f"{100 * n:.1f}" for n in (point.accuracy.value, point.accuracy.low, point.accuracy.high))
        budget = "no limit" if point.budget is None else str(point.budget)
        table.add_row(budget, value, f"{low} to {high}", f"{point.thinking:.0f}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"{points[0].problems} problems, answered greedily.")


def check_plot(path: Path) -> None:
    """Raise UsageError where a plot cannot be drawn."""
    if path.suffix not in (".svg", ".png", ".pdf") or not path.parent.is_dir():
        raise UsageError(f"{path} is no file for a plot; give a name that ends in .svg, .png or .pdf, in a folder")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; install it with `pip install 'dsr1[plot]'`")


def plot_budgets(model: str, points: list[BudgetPoint], path: Path) -> None:
    """Draw accuracy over the tokens that were thought."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    thought = [point.thinking for point in points]
    accuracy = [100 * point.accuracy.value for point in points]
    low = [100 * (point.accuracy.value - point.accuracy.low) for point in points]
    high = [100 * (point.accuracy.high - point.accuracy.value) for point in points]
    axes.errorbar(thought, accuracy, yerr=[low, high], marker="o", capsize=3)
    for point, x, y in zip(points, thought, accuracy, strict=True):
        axes.annotate(
            "no limit" if point.budget is None else str(point.budget), (x, y), (4, -12), textcoords="offset points"
        )
    axes.set(xlabel="tokens thought, mean", ylabel="solved, %", title=f"{model}: accuracy against the thinking budget")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)

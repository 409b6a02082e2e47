"""`dsr1 plan`: what fits and where everything goes, before anything is downloaded. Imports neither torch nor numba."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli.escape import escape, say
from cli.report import show_report
from offload.costs import Prediction
from offload.machine import Machine
from offload.parts import Available
from offload.plan import Plan
from offload.plan_file import save_plan
from offload.sizes import format_size
from offload.wishes import Wishes, plan_for
from quant.config import load_config
from quant.errors import CheckpointError, StoreError
from quant.hub import HUB_ID, Published, published_in, published_on_hub
from quant.inventory import Inventory
from quant.journal import is_unfinished
from quant.manifest import MANIFEST_NAME, check_layers, read_manifest
from quant.recipes import DEFAULT_RECIPE, Recipe, find_recipe
from quant.shapes import KNOWN_MODELS, known_shape
from quant.store_formats import representations

NANO_STORE, NANO_CHECKPOINT = "nano-r1", "nano-r1-fp8"
TIERS = {"gpu": "GPU", "ram": "RAM", "disk": "disk"}


@dataclass(frozen=True)
class Subject:
    """A model to plan for. title: what it is, in a few words."""

    title: str
    inventory: Inventory
    available: Available
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """What `dsr1 plan` does with its plan. save: a file to write it to."""

    as_json: bool = False
    explain: bool = False
    save: Path | None = None


def plan(model: str, wishes: Wishes, recipe: str | None = None, output: Output | None = None) -> None:
    """Print the plan for `model`. Raises PlanError, or another Dsr1Error, when there is none."""
    output = output or Output()
    subject = find_subject(model, None if recipe is None else find_recipe(recipe))
    notes = list(subject.notes)
    made = plan_for(wishes, subject.inventory, subject.available, notes)
    prediction = made.planning.costs.predict(made.plan)
    if output.save is not None:
        save_plan(made.plan, output.save)
    if output.as_json:
        planned_for = made.planning.machine
        machine = {"name": planned_for.name, "source": planned_for.source, "date": planned_for.date}
        about = {"model": model, "as": subject.title, "machine": machine, "prediction": asdict(prediction)}
        print(json.dumps(about | made.plan.to_json() | {"model": model, "shape": made.plan.model}))
        return
    for note in notes:
        say(note)
    console = Console(highlight=False, markup=False)
    show(made.plan, subject.title, console)
    for line in (*speeds(prediction, made.planning.machine), *(made.plan.reasons if output.explain else ())):
        console.print(line, soft_wrap=True)
    show_report(Path(model).expanduser(), console)


def speeds(prediction: Prediction, machine: Machine) -> list[str]:
    """What is predicted, with what limits it, and for which machine."""
    how = machine.source + (f", {machine.date}" if machine.date else "")
    speed = f"{machine.cores} cores, {machine.read_bytes_s / 1e9:.1f} GB/s of RAM"
    return [
        f"Predicted: prefill {_figure(prediction.prefill_tok_s)} tokens/s (a prompt of {prediction.prompt} tokens; "
        f"limit: {prediction.prefill_limit}), decode {_figure(prediction.decode_tok_s)} tokens/s (limit: "
        f"{prediction.decode_limit}).",
        f"For {escape(machine.name)} ({escape(how)}): {speed}. "
        "The size of prefill's chunks follows from these speeds; a plan that is saved keeps it.",
    ]


def find_subject(model: str, recipe: Recipe | None) -> Subject:
    """What `model` names: a folder, a built-in model, a model of the table, or any other one of the Hub.

    recipe: plan for the store that `dsr1 quantize` would make of it. Raises Dsr1Error if there is no such model.
    """
    folder = Path(model).expanduser()
    if model in (NANO_STORE, NANO_CHECKPOINT):
        if model == NANO_STORE:
            recipe = recipe or find_recipe(DEFAULT_RECIPE)
        return _published_subject(model, published_in(_nano_folder()), recipe)
    if is_unfinished(folder):
        raise StoreError(
            f"{folder} is a conversion that was not finished; run the same `dsr1 quantize` again to finish it"
        )
    if (folder / MANIFEST_NAME).exists():
        return _store_subject(folder, recipe)
    if folder.is_dir():
        return _published_subject(model, published_in(folder), recipe)
    if shape := known_shape(model):
        inventory = Inventory.of(shape.config)
        return _store_of(model, inventory, recipe or find_recipe(DEFAULT_RECIPE), shape.notes)
    if HUB_ID.fullmatch(model):
        return _published_subject(model, published_on_hub(model), recipe)
    raise CheckpointError(
        f"there is no folder {model}, and no built-in model of that name ({NANO_STORE}, {NANO_CHECKPOINT}); "
        f"give a folder or a Hub id such as {next(iter(KNOWN_MODELS))}"
    )


def _store_of(model: str, inventory: Inventory, recipe: Recipe, notes: Sequence[str]) -> Subject:
    title, formats = f"{model} as a store of recipe {recipe.name}", recipe.of(inventory.config)
    return Subject(title, inventory, lambda spec: representations(spec, formats), tuple(notes))


def _published_subject(model: str, published: Published, recipe: Recipe | None) -> Subject:
    if recipe is not None:
        return _store_of(model, published.inventory, recipe, published.shape.notes)
    return Subject(f"{model} as it is published", published.inventory, published.available, published.shape.notes)


def _store_subject(folder: Path, recipe: Recipe | None) -> Subject:
    """A store runs as what it is; its manifest tells enough."""
    manifest = read_manifest(folder)
    stored = manifest.formats
    if recipe is not None and recipe.name != stored.recipe:
        raise StoreError(
            f"{folder} is a store of recipe {stored.recipe} and stays one; "
            "--recipe is for models that are not quantised yet"
        )
    config = replace(load_config(folder), n_mtp_layers=manifest.mtp_layers)
    check_layers(folder, manifest, config)
    title = f"{folder}, a store of recipe {stored.recipe}"
    return Subject(title, Inventory.of(config), lambda spec: representations(spec, stored))


def _nano_folder() -> Path:
    """The model that ships in hybrid_rt, found without importing it, as that imports torch."""
    package = find_spec("hybrid_rt")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "nano_r1"


def show(made: Plan, title: str, console: Console) -> None:
    """The plan as a table, and what it amounts to."""
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    for name in ("part", "layers", "format", "where"):
        table.add_column(name, overflow="fold", no_wrap=name in ("part", "layers"))
    table.add_column("size", justify="right", no_wrap=True)
    for row in made.table():
        where = TIERS[row.tier] if row.residency == "gpu" else f"{TIERS[row.tier]}, {row.residency}"
        table.add_row(row.part, row.layers, row.representation, where, format_size(row.nbytes))
    console.print(table)
    for line in summary(made):
        console.print(line, soft_wrap=True)


def summary(made: Plan) -> list[str]:
    """What each memory holds and has free, and what bounds the speed of decoding."""
    lines = []
    if made.on_gpu:
        lines.append(_sum("GPU", made.gpu_bytes, made.gpu_budget))
    mapped = f"; {format_size(made.resident_bytes('mapped'))} are files, which Linux can drop and read again"
    lines.append(_sum("RAM", made.ram_bytes, made.ram_budget) + mapped)
    if made.nodes > 1:
        lines.append(
            f"Rows of each routed expert are split over {made.nodes} NUMA nodes, each part in its node's memory."
        )
    if made.transfers is not None:
        crossing = _figure(made.transfers.decode / 1e6)
        lines.append(
            f"A token moves {crossing} MB over PCIe and reads {_figure(made.decode_ram_bytes / 1e6)} MB from RAM."
        )
    elif made.decode_ram_bytes:
        lines.append(f"A token reads {_figure(made.decode_ram_bytes / 1e6)} MB of weights from RAM.")
    return lines


def _sum(name: str, taken: int, budget: int) -> str:
    return f"{name}: {format_size(taken)} of {format_size(budget)}, {format_size(budget - taken)} free"


def _figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"

"""`dsr1 plan`: what fits and where everything goes, before anything is downloaded. Imports neither torch nor numba."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli.escape import escape, say
from cli.report import show_report
from offload.hardware import choose_device, usable_ram
from offload.plan import Plan
from offload.planner import Available, Budget, choose_context, choose_residency, make_plan
from offload.sizes import format_size, parse_size
from offload.topology import read_topology
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
EXAMPLE_BANDWIDTHS = (100, 400)  # GB/s: a workstation, and two sockets of DDR5
TIERS = {"gpu": "GPU", "ram": "RAM"}


@dataclass(frozen=True)
class Subject:
    """A model to plan for. title: what it is, in a few words."""

    title: str
    inventory: Inventory
    available: Available
    notes: tuple[str, ...] = ()


def plan(
    model: str,
    gpu_mem: str | None = None,
    ram: str | None = None,
    context: int | None = None,
    recipe: str | None = None,
    device: str = "auto",
    residency: str | None = None,
    as_json: bool = False,
) -> None:
    """Print the plan for `model`. Raises PlanError, or another Dsr1Error, when there is none."""
    subject = find_subject(model, None if recipe is None else find_recipe(recipe))
    notes = list(subject.notes)
    chosen, gpu_budget = choose_device(device, None if gpu_mem is None else parse_size(gpu_mem), notes)
    nodes = read_topology().available
    budget = Budget(
        device=chosen,
        gpu_mem=gpu_budget,
        ram=usable_ram() if ram is None else parse_size(ram),
        context=choose_context(context, subject.inventory.config.max_seq_len, notes),
        residency=choose_residency(residency, subject.inventory, subject.available, nodes, notes),
        nodes=len(nodes),
    )
    made = make_plan(subject.inventory, subject.available, budget, notes)
    if as_json:
        print(json.dumps({"model": model, "as": subject.title} | made.to_json()))
        return
    for note in notes:
        say(note)
    console = Console(highlight=False, markup=False)
    show(made, subject.title, console)
    show_report(Path(model).expanduser(), console)


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
        table.add_column(name, overflow="fold")
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
    if not made.decode_ram_bytes:
        return lines
    ceilings = [f"{speed} GB/s: {_figure(speed * 1e9 / made.decode_ram_bytes)}" for speed in EXAMPLE_BANDWIDTHS]
    lines.append(
        f"A token reads {_figure(made.decode_ram_bytes / 1e6)} MB of weights from RAM. The memory's bandwidth divided "
        f"by that is the most tokens a second ({', '.join(ceilings)})."
    )
    return lines


def _sum(name: str, taken: int, budget: int) -> str:
    return f"{name}: {format_size(taken)} of {format_size(budget)}, {format_size(budget - taken)} free"


def _figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"

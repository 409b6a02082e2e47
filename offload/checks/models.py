"""Which published models fit in the RAM, as 4-bit stores."""

from dataclasses import dataclass

from offload.checks.check import Check
from offload.parts import Available, Budget
from offload.pins import parse_pins
from offload.plan import Plan, PlanError
from offload.planner import Planning, choose_context, make_plan
from offload.sizes import format_size
from offload.this_machine import machine_for
from quant.inventory import Inventory
from quant.recipes import DEFAULT_RECIPE, find_recipe
from quant.shapes import known_shape
from quant.store_formats import representations

MODELS = ("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V2-Lite", "moonshotai/Moonlight-16B-A3B")
NO_LIMIT = 2**62
LEAST = ("cache=int8", "chunk=128")  # what a plan comes down to where RAM is short


@dataclass(frozen=True)
class Fit:
    """A model. nbytes: RAM that it takes if it fits, and at least needs if it does not."""

    name: str
    nbytes: int
    fits: bool

    def sentence(self) -> str:
        verb, verdict = ("takes", "yes") if self.fits else ("needs", "no")
        return f"{self.name} {verb} {format_size(self.nbytes)}: {verdict}"


def models(usable: int) -> Check:
    """usable: bytes of RAM. Models that this version only plans for are left out."""
    fits = [fit for name in MODELS if (fit := _fit(name, usable)) is not None]
    value = "; ".join(fit.sentence() for fit in fits)
    if any(fit.fits for fit in fits):
        return Check("models at 4 bits", value)
    remedy = "add RAM, or raise the container's limit; nano-r1, which comes with dsr1, runs anyway"
    return Check("models at 4 bits", value, "attention", remedy)


def _fit(hub_id: str, usable: int) -> Fit | None:
    """How a model with its default context lives in `usable` bytes of RAM; None for one that does not run yet."""
    shape = known_shape(hub_id)
    if shape is None or not shape.runs:
        return None
    inventory, formats = Inventory.of(shape.config), find_recipe(DEFAULT_RECIPE).of(shape.config)
    name = hub_id.partition("/")[2]
    try:
        plan = _plan(inventory, lambda spec: representations(spec, formats), usable)
        return Fit(name, plan.ram_bytes, True)
    except PlanError:
        smallest = _plan(inventory, lambda spec: representations(spec, formats)[-1:], NO_LIMIT, LEAST)
        return Fit(name, smallest.ram_bytes, False)


def _plan(inventory: Inventory, available: Available, ram: int, pins: tuple[str, ...] = ()) -> Plan:
    context = choose_context(None, inventory.config.max_seq_len, [])
    budget = Budget("cpu", 0, ram, context)
    return make_plan(Planning(inventory, available, budget, machine_for(None), parse_pins(pins)))

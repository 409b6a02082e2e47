"""What is said when no plan fits: what is short, and the cheapest ways to make it fit, each with its numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from offload.parts import Available, expert_forms
from offload.plan import Plan
from offload.sizes import format_size
from quant.packed import EXPERT_FORMATS
from quant.recipes import DEFAULT_RECIPE, RECIPES
from quant.store_formats import representations

if TYPE_CHECKING:
    from offload.planner import Planning

CONTEXT_STEP = 1024  # advice on the context comes in these steps
GIB = 2**30


@dataclass(frozen=True)
class Shortage:
    """A memory that is too small for the smallest plan."""

    what: str
    option: str
    needed: int
    budget: int

    def sentence(self) -> str:
        return (
            f"{self.what} takes {format_size(self.needed)} and {self.option} is {format_size(self.budget)}: "
            f"{format_size(self.needed - self.budget)} short"
        )


@dataclass(frozen=True)
class Shortages:
    """Of the `smallest` plan of a planning. find_plan: plans anew, for what would fit."""

    planning: "Planning"
    smallest: Plan
    find_plan: Callable[["Planning"], tuple[Plan | None, Plan]]

    def text(self) -> str:
        """All of it in one sentence."""
        short = self.all()
        advice = [*self._context(), *self._store()]
        needs = " and ".join(f"{one.option} {ceil(one.needed / GIB)}G" for one in short)
        advice.append((f"as it is, it needs {needs}" if advice else f"it needs {needs}") + self._exact(short))
        return "; ".join([one.sentence() for one in short] + advice)

    def all(self) -> list[Shortage]:
        plan = self.smallest
        gpu = Shortage("the GPU part at its smallest", "--gpu-mem", plan.gpu_bytes, plan.gpu_budget)
        ram = Shortage(_ram_part(plan), "--ram", plan.ram_bytes, plan.ram_budget)
        return [one for one in ([gpu, ram] if plan.on_gpu else [ram]) if one.needed > one.budget]

    def _exact(self, short: list[Shortage]) -> str:
        """With RAM alone short and a GPU that everything fits at its best: what would keep it so."""
        planning = self.planning
        if not self.smallest.on_gpu or [one.option for one in short] != ["--ram"]:
            return ""
        roomy = replace(planning, budget=replace(planning.budget, ram=2**60))
        best = self.find_plan(roomy)[0]
        if best is None or ceil(best.ram_bytes / GIB) <= ceil(short[0].needed / GIB):
            return ""
        return f", or --ram {ceil(best.ram_bytes / GIB)}G with all else as exact as it is"

    def _context(self) -> Iterator[str]:
        """The longest context that fits, in whole steps."""
        most = self._longest()
        if most:
            yield f"--context {most} fits"

    def _longest(self) -> int:
        low, high = 0, -(-self.planning.budget.context // CONTEXT_STEP)  # steps that fit, and that do not
        if high > 1 and not self._fits(context=CONTEXT_STEP):
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(context=middle * CONTEXT_STEP) else (low, middle)
        return low * CONTEXT_STEP

    def _store(self) -> Iterator[str]:
        """A smaller store of the same model, the most exact one of those that ship."""
        now = expert_forms(self.planning.inventory, self.planning.available)
        if any(form.representation not in EXPERT_FORMATS for form in now):
            if self._fits(recipe=DEFAULT_RECIPE):
                yield "the 4-bit store that `dsr1 quantize` makes of the published checkpoint fits"
            return
        for recipe in (DEFAULT_RECIPE, "fast"):
            smaller = expert_forms(self.planning.inventory, self._store_of(recipe))
            if sum(form.nbytes for form in smaller) < sum(form.nbytes for form in now) and self._fits(recipe=recipe):
                bits = RECIPES[recipe].experts.gate_up.bits_per_weight
                yield f"a store made with --recipe {recipe} ({bits:g} bits a weight) fits, with more error"
                return

    def _store_of(self, recipe: str) -> Available:
        formats = RECIPES[recipe].of(self.planning.config)
        return lambda spec: representations(spec, formats)

    def _fits(self, context: int | None = None, recipe: str | None = None) -> bool:
        planning, budget = self.planning, self.planning.budget
        if context is not None:
            budget = replace(budget, context=context)
        if recipe is None:
            return self.find_plan(replace(planning, budget=budget))[0] is not None
        other = replace(planning, budget=budget, available=self._store_of(recipe))
        return self.find_plan(other)[0] is not None


def _ram_part(plan: Plan) -> str:
    experts = sum(p.nbytes for p in plan.placements if p.component == "routed_expert" and p.tier == "ram")
    return f"what stays in RAM ({format_size(experts)} of it routed experts)"

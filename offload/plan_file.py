"""Plans on disk: `dsr1 plan --save FILE`, `dsr1 run --plan FILE`.

A file holds the choices; every byte is counted anew when it is read, for the model at hand, so a file may be edited.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.parts import Part
from offload.pins import CACHE_FORMATS, LEAST_STREAMED, pinned_cache, pinned_chunk, pinned_stream
from offload.plan import (
    PLAN_VERSION,
    RAM_RESIDENCIES,
    SLICE_EXPERTS,
    Device,
    Plan,
    PlanError,
    Range,
    Residency,
    Streaming,
    Tier,
)
from offload.sizes import format_size
from quant.files import new_file

if TYPE_CHECKING:
    from offload.planner import Planning
    from offload.wishes import Wishes

MOST_BYTES = 2**26
MOST_STREAMED = 16  # experts of a slice
AGAIN = "make it anew with `dsr1 plan MODEL --save FILE`"
Key = tuple[int | None, str]


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan, whole or not at all. Raises StoreError when the disk refuses."""
    with new_file(path) as file:
        file.write(json.dumps(plan.to_json(), indent=1).encode() + b"\n")


@dataclass(frozen=True)
class SavedPlan:
    """A plan file, read and not yet compared with a model."""

    path: Path
    fields: Mapping[str, Any]

    def completed(self, wishes: "Wishes") -> "Wishes":
        """The wishes, with what the user left out as the file has it."""
        device: Device = _one_of(self.fields, "device", ("cuda", "cpu", "emulate"), self.path)
        gpu_mem = None if device == "cpu" else _count(self.fields, "gpu_budget", self.path)
        deferred = _count(self.fields, "deferred_experts", self.path, least=0)
        return replace(
            wishes,
            device=device if wishes.device == "auto" else wishes.device,
            gpu_mem=gpu_mem if wishes.gpu_mem is None else wishes.gpu_mem,
            ram=_count(self.fields, "ram_budget", self.path) if wishes.ram is None else wishes.ram,
            context=_count(self.fields, "context", self.path) if wishes.context is None else wishes.context,
            defer_experts=deferred if wishes.defer_experts is None else wishes.defer_experts,
        )

    def reused(self, planning: "Planning") -> Plan:
        """The file's plan for the model and the budgets of `planning`, with its pins on top.

        Raises PlanError for a plan of another model, and for one that does not fit.
        """
        from offload.planner import fits, recount

        if self.fields.get("model") != planning.model:
            raise PlanError(f"{self.path} is a plan for another model; {AGAIN}")
        parts = _parts(self.fields, planning, self.path)
        for pin in planning.pins:
            parts = pin.apply(parts)
        plan = recount(planning.config, self._plan(planning, parts))
        if plan.device == "cpu" and any(placement.tier == "gpu" for placement in plan.placements):
            raise PlanError(f"{self.path} puts parts on a GPU, and the device is cpu; leave --device out, or {AGAIN}")
        if not fits(plan):
            raise PlanError(
                f"the plan of {self.path} takes {format_size(plan.gpu_bytes)} of {format_size(plan.gpu_budget)} of the "
                f"GPU and {format_size(plan.ram_bytes)} of {format_size(plan.ram_budget)} of RAM; give more, or {AGAIN}"
            )
        return plan

    def _plan(self, planning: "Planning", parts: Sequence[Part]) -> Plan:
        from offload.planner import empty_plan

        chunk = pinned_chunk(planning.pins) or _count(self.fields, "prefill_chunk", self.path)
        copied = any(part.residency == "copied" and part.experts for part in parts)
        return replace(
            empty_plan(planning),
            prefill_chunk=min(chunk, planning.budget.context),
            cache_format=pinned_cache(planning.pins) or _one_of(self.fields, "cache_format", CACHE_FORMATS, self.path),
            placements=tuple(part.placed() for part in parts),
            reasons=(f"Everything is as {self.path.name} says" + (", and --pin." if planning.pins else "."),),
            nodes=planning.budget.nodes if copied else 1,
            streaming=self._streaming(planning),
        )

    def _streaming(self, planning: "Planning") -> Streaming | None:
        """As a pin or the file has it."""
        pinned, found = pinned_stream(planning.pins), self.fields.get("streaming")
        if pinned == "off" or (pinned is None and found is None) or planning.budget.device == "cpu":
            return None
        if found is not None and not isinstance(found, dict):
            raise PlanError(f"{self.path}: streaming is {str(found)[:40]!r}, which is damaged; {AGAIN}")
        fields = {"from_tokens": pinned, "slice_experts": SLICE_EXPERTS} if found is None else found
        size = min(MOST_STREAMED, _count(fields, "slice_experts", self.path))
        least = max(LEAST_STREAMED, pinned or _count(fields, "from_tokens", self.path))
        return Streaming(least, min(size, planning.config.n_routed_experts))


def read_plan(path: Path) -> SavedPlan:
    """The plan of a file. Raises PlanError for a file that is none, or is one of another version."""
    fields = _read(path)
    if fields.get("version") != PLAN_VERSION:
        raise PlanError(f"{path} is a plan of version {str(fields.get('version'))[:20]}, not {PLAN_VERSION}; {AGAIN}")
    return SavedPlan(path, fields)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise PlanError(f"there is no plan in {path}; {AGAIN}")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise PlanError(f"{path} is not a plan; {AGAIN}")
    return found


def _count(fields: Mapping[str, Any], name: str, path: Path, least: int = 1) -> int:
    value = fields.get(name)
    if type(value) is not int or not least <= value < 2**60:
        raise PlanError(f"{path}: {name} is {str(value)[:40]!r}, which is no number from {least} on; {AGAIN}")
    return value


def _one_of(fields: Mapping[str, Any], name: str, known: Sequence[Any], path: Path) -> Any:
    if fields.get(name) not in known:
        raise PlanError(f"{path}: {name} is {str(fields.get(name))[:40]!r}, and not one of {', '.join(known)}; {AGAIN}")
    return fields[name]


def _parts(fields: Mapping[str, Any], planning: "Planning", path: Path) -> list[Part]:
    """The placements of a file, each checked against what the model has, in the model's order."""
    listed = fields.get("placements")
    pieces: dict[Key, list[Mapping[str, Any]]] = {}
    for entry in listed if isinstance(listed, list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("component"), str):
            raise PlanError(f"{path}: a placement is damaged; {AGAIN}")
        layer = entry.get("layer")
        pieces.setdefault((layer if type(layer) is int else None, entry["component"]), []).append(entry)
    parts: list[Part] = []
    for part in planning.unpinned:
        entries = pieces.pop((part.layer, part.component), [])
        ranges = [_range(entry, path) for entry in entries]
        if not _covers(ranges, part.experts):
            raise PlanError(f"{path} places {part.component} of layer {part.layer} not exactly once; {AGAIN}")
        parts += [_chosen(part, entry, experts, path) for entry, experts in zip(entries, ranges, strict=True)]
    if pieces:
        raise PlanError(f"{path} places {next(iter(pieces))[1][:20]!r}, which this model does not have; {AGAIN}")
    return parts


def _range(entry: Mapping[str, Any], path: Path) -> Range | None:
    found = entry.get("experts")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(end) is int for end in found):
        raise PlanError(f"{path}: {str(found)[:40]} is no range of experts; {AGAIN}")
    return found[0], found[1]


def _covers(ranges: Sequence[Range | None], whole: Range | None) -> bool:
    """Whether ranges follow each other from one end of the whole to the other."""
    if whole is None or not ranges:
        return list(ranges) == [None] and whole is None
    at = whole[0]
    for piece in ranges:
        if piece is None or piece[0] != at or piece[1] <= at:
            return False
        at = piece[1]
    return at == whole[1]


def _chosen(part: Part, entry: Mapping[str, Any], experts: Range | None, path: Path) -> Part:
    """A part as a file wants it. Raises PlanError for what cannot be."""
    if experts is not None and experts != part.experts:
        part = part.only(experts)
    where = f"{path}: {part.component} of layer {part.layer}"
    form = next((form for form in part.forms if form.representation == entry.get("representation")), None)
    if form is None:
        kept = " or ".join(form.representation for form in part.forms)
        raise PlanError(
            f"{where} is wanted as {str(entry.get('representation'))[:40]!r} and is there as {kept}; {AGAIN}"
        )
    tier, residency = entry.get("tier"), entry.get("residency")
    if tier == "disk":
        raise PlanError(f"{where} is on the disk, from which this version reads nothing as it is needed; {AGAIN}")
    places: list[tuple[Tier, Residency]] = [(part.tier, part.residency)]
    if part.movable:
        places += [("gpu", "gpu"), *(("ram", kind) for kind in RAM_RESIDENCIES)]
    if (tier, residency) not in places:
        raise PlanError(f"{where} cannot be in {str(tier)[:20]}, {str(residency)[:20]}; {AGAIN}")
    others = tuple(other for other in part.forms if other != form)  # which a pin may ask for
    place = next(place for place in places if place == (tier, residency))
    return replace(part, forms=(form, *others), tier=place[0], residency=place[1])

"""Which routed experts go to what is left of the GPU.

Without a profile all experts count alike, and whole layers go first: a layer that is all on the GPU needs no exchange
with the host. With one, the most used experts go first, wherever they are.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from offload.parts import Part
from offload.plan import Placement, Plan, PlanError, Range
from quant.inventory import Inventory

MOST_BYTES = 2**26  # of a profile's file
PROFILE_VERSION = 1
LEAST_SHARE = 8  # without a profile, a layer is split if at least one in so many of its experts fits


Key = tuple[int | None, Range | None]  # a layer's routed experts, or a range of them


@dataclass(frozen=True)
class Usage:
    """How often each routed expert of each layer was chosen."""

    counts: Mapping[int, Sequence[int]]

    @classmethod
    def read(cls, path: Path, inventory: Inventory) -> "Usage":
        """{"version": 1, "counts": {"3": [times of expert 0, ...], ...}}. Raises PlanError for anything else."""
        config = inventory.config
        try:
            found = json.loads(path.read_text()) if path.stat().st_size <= MOST_BYTES else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("version") != PROFILE_VERSION:
            raise PlanError(f"{path} is not a profile of experts, version {PROFILE_VERSION}; docs/plan.md has its form")
        layers, counts = found.get("counts"), {}
        for name, values in layers.items() if isinstance(layers, dict) else ():
            known = name.isascii() and name.isdigit() and len(name) < 6 and config.is_moe(int(name))
            whole = isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
            if not known or not whole or len(values) != config.n_routed_experts:
                raise PlanError(
                    f"{path}: layer {name[:20]!r} must have {config.n_routed_experts} counts and be one of layers "
                    f"{config.n_dense_layers} to {config.n_layers - 1}; make the profile with this model"
                )
            counts[int(name)] = values
        if not counts:
            raise PlanError(f"{path} counts no expert; docs/plan.md has the form of a profile")
        return cls(counts)

    def of(self, layer: int | None) -> Sequence[int]:
        """The counts of a layer; empty where there are none."""
        return () if layer is None else self.counts.get(layer, ())


def place_experts(plan: Plan, parts: Sequence[Part], usage: Usage | None, room: int) -> Plan:
    """The plan with as many experts on the GPU as fit `room` bytes; of layers that are split, the rest is mapped."""
    movable = {(part.layer, part.experts): part for part in parts if part.movable}
    if room <= 0 or not movable:
        return plan
    one = {
        key: part.forms[0].nbytes // (part.experts[1] - part.experts[0])
        for key, part in movable.items()
        if part.experts
    }
    chosen: dict[Key, list[int]] = {key: [] for key in movable}
    for key, expert in _preferred(list(movable), usage):
        if one[key] > room:
            break
        room -= one[key]
        chosen[key].append(expert)
    if usage is None:
        chosen = {key: experts for key, experts in chosen.items() if _is_worth(key, experts)}
    placements = [
        piece for placed in plan.placements for piece in _cut(placed, chosen.get((placed.layer, placed.experts)))
    ]
    return replace(plan, placements=tuple(placements))


def _preferred(keys: Sequence[Key], usage: Usage | None) -> Iterator[tuple[Key, int]]:
    """All experts, those first that a GPU serves best."""
    experts = [(key, expert) for key in keys if key[1] for expert in range(*key[1])]
    if usage is not None:
        counts = {key: usage.of(key[0]) for key in keys}
        experts.sort(key=lambda which: -counts[which[0]][which[1]] if counts[which[0]] else 0)  # stable: by number
    yield from experts


def _is_worth(key: Key, experts: Sequence[int]) -> bool:
    """Whether a layer's work is shared out: a few experts on the GPU spare less than they cost."""
    return key[1] is not None and LEAST_SHARE * len(experts) >= key[1][1] - key[1][0]


def _cut(placed: Placement, on_gpu: Sequence[int] | None) -> Iterator[Placement]:
    """A range of experts in pieces, some of them on the GPU."""
    if not on_gpu or placed.experts is None:
        yield placed
        return
    one, wanted = placed.nbytes // placed.expert_count, set(on_gpu)
    rest = "mapped" if placed.residency == "copied" else placed.residency  # copies are of whole layers
    for is_wanted, run in groupby(range(*placed.experts), key=wanted.__contains__):
        numbers = list(run)
        piece = replace(placed, experts=(numbers[0], numbers[-1] + 1), nbytes=one * len(numbers))
        yield replace(piece, tier="gpu", residency="gpu") if is_wanted else replace(piece, residency=rest)

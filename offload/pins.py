"""Single choices of the user that a plan keeps to, whatever else it chooses: `--pin experts:3-5=gpu`.

    PART[:LAYERS[/EXPERTS]]=WHAT    LAYERS and EXPERTS as 3 or 3-5

PART is one of PIN_PARTS, for a part of the model; or `cache`, `chunk` or `stream`, which have no layers. WHAT is a
format that the part is stored in (q8, accurate ...); for routed experts also gpu or how they live in RAM; for the cache
bfloat16 or int8; for the chunk a number of tokens; for the stream of experts to the GPU `off`, or the least tokens of a
pass that has one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from offload.plan import RAM_RESIDENCIES, PlanComponent, PlanError, Range, Residency
from quant.errors import UsageError
from quant.inventory import CacheFormat
from quant.packed import EXPERT_FORMATS

if TYPE_CHECKING:
    from offload.parts import Part

PIN_PARTS: dict[str, PlanComponent] = {
    "experts": "routed_expert",
    "shared": "shared_expert",
    "dense": "dense",
    "attention": "attention",
    "kv_b": "kv_b",
    "head": "head",
}
CACHE_FORMATS: tuple[CacheFormat, ...] = get_args(CacheFormat)
NUMBERS = r"\d{1,9}(?:-\d{1,9})?"
PIN = re.compile(
    rf"(?P<part>\w+)(?::(?P<layers>{NUMBERS})(?:/(?P<experts>{NUMBERS}))?)?=(?P<what>[\w+]{{1,20}})", re.ASCII
)
FORM = "write it as experts:3-5=gpu, experts:3/0-63=gpu, attention=accurate, cache=int8, chunk=512 or stream=off"
OFF = "off"
LEAST_STREAMED = 64  # tokens


@dataclass(frozen=True)
class Pin:
    """layers, experts: ranges (first, end); None for all. text: as the user wrote it."""

    text: str
    part: PlanComponent | Literal["cache", "chunk", "stream"]
    layers: Range | None
    experts: Range | None
    what: str

    def apply(self, parts: Sequence["Part"]) -> list["Part"]:
        """The parts with this choice made. Raises PlanError for a choice that cannot be, or that no part has."""
        if self.part in ("cache", "chunk", "stream"):
            return list(parts)
        pinned = [piece for part in parts for piece in self._apply(part)]
        if not any(self._concerns(part) for part in parts):
            raise PlanError(f"--pin {self.text}: this model has no such part; `dsr1 plan` lists parts and layers")
        return pinned

    def _concerns(self, part: "Part") -> bool:
        in_layers = self.layers is None or part.layer is not None and self.layers[0] <= part.layer < self.layers[1]
        return part.component == self.part and not part.is_mtp and in_layers and self._meets(part)

    def _meets(self, part: "Part") -> bool:
        if self.experts is None or part.experts is None:
            return True
        return self.experts[0] < part.experts[1] and part.experts[0] < self.experts[1]

    def _apply(self, part: "Part") -> Iterator["Part"]:
        """A part cut into what is pinned and what is not."""
        if not self._concerns(part):
            yield part
            return
        if self.experts is None or part.experts is None:
            yield self._chosen(part)
            return
        first, end = part.experts
        inner = max(first, self.experts[0]), min(end, self.experts[1])
        for piece in ((first, inner[0]), inner, (inner[1], end)):
            if piece[0] < piece[1]:
                yield self._chosen(part.only(piece)) if piece == inner else part.only(piece)

    def _chosen(self, part: "Part") -> "Part":
        for form in part.forms:
            if form.representation == self.what:
                return replace(part, forms=(form,))
        if part.experts is None or self.what not in ("gpu", *RAM_RESIDENCIES):
            kept = ", ".join(form.representation for form in part.forms)
            places = "; routed experts may be gpu, " + ", ".join(RAM_RESIDENCIES) if part.experts else ""
            raise PlanError(f"--pin {self.text}: the choice there is among {kept}{places}")
        if self.what == "mapped":
            return replace(part, tier="ram", residency="mapped", pinned=True)
        if part.forms[0].representation not in EXPERT_FORMATS:
            raise PlanError(
                f"--pin {self.text}: only a store's experts can be anything but mapped; make one with `dsr1 quantize`"
            )
        if self.what == "copied" and self.experts is not None:
            raise PlanError(f"--pin {self.text}: only whole layers of experts can be copied; leave the experts out")
        residency: Residency = "gpu"
        for known in RAM_RESIDENCIES:
            residency = known if known == self.what else residency
        return replace(part, tier="gpu" if residency == "gpu" else "ram", residency=residency, pinned=True)


def parse_pins(texts: Sequence[str]) -> tuple[Pin, ...]:
    """The pins that the user gave. Raises UsageError for what is none."""
    return tuple(_parse_pin(text) for text in texts)


def _parse_pin(text: str) -> Pin:
    found = PIN.fullmatch(text)
    if found is None:
        raise UsageError(f"--pin {text!r} is not understood; {FORM}")
    name, what = found["part"], found["what"]
    layers, experts = _range(found["layers"]), _range(found["experts"])
    if what == "disk":
        raise UsageError(f"--pin {text}: this version does not read weights from the disk as they are needed; {FORM}")
    if name in PIN_PARTS:
        if experts is not None and name != "experts":
            raise UsageError(f"--pin {text}: only experts have numbers; {FORM}")
        return Pin(text, PIN_PARTS[name], layers, experts, what)
    if name == "cache" and layers is None and what in CACHE_FORMATS:
        return Pin(text, "cache", None, None, what)
    if name == "chunk" and layers is None and what.isascii() and what.isdigit() and int(what) > 0:
        return Pin(text, "chunk", None, None, what)
    if name == "stream" and layers is None and (what == OFF or what.isascii() and what.isdigit()):
        if what != OFF and int(what) < LEAST_STREAMED:
            raise UsageError(
                f"--pin {text}: only passes of {LEAST_STREAMED} tokens and more can stream experts; {FORM}"
            )
        return Pin(text, "stream", None, None, what)
    known = ", ".join([*PIN_PARTS, "cache", "chunk", "stream"])
    raise UsageError(f"--pin {text!r} is not understood; {FORM}; parts are {known}")


def _range(text: str | None) -> Range | None:
    """(first, end) of "3" or "3-5". Raises UsageError for one that goes backwards."""
    if text is None:
        return None
    first, _, last = text.partition("-")
    begin, end = int(first), int(last or first) + 1
    if end <= begin:
        raise UsageError(f"the range {text} of a --pin goes backwards; {FORM}")
    return begin, end


def pinned_cache(pins: Sequence[Pin]) -> CacheFormat | None:
    """The cache's format that the pins ask for; the last one counts."""
    asked = [pin.what for pin in pins if pin.part == "cache"]
    return next((fmt for fmt in CACHE_FORMATS if asked and fmt == asked[-1]), None)


def pinned_chunk(pins: Sequence[Pin]) -> int | None:
    """The chunk that the pins ask for; the last one counts."""
    asked = [int(pin.what) for pin in pins if pin.part == "chunk"]
    return asked[-1] if asked else None


def pinned_stream(pins: Sequence[Pin]) -> int | Literal["off"] | None:
    """From how many tokens on the pins want experts streamed, if they say; the last one counts."""
    asked = [pin.what for pin in pins if pin.part == "stream"]
    if not asked:
        return None
    return "off" if asked[-1] == OFF else int(asked[-1])

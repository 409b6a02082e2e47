"""report.json beside a store: what was lost where. Of each packed tensor: bits a weight and normalised squared error.

The normalised mean square error (NMSE) is Σ e² / Σ w². A weighted one, Σ c e² / Σ c w², with the mean square c of a
column's inputs, is there where the store was calibrated.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.inventory import Inventory, TensorSpec
from quant.store_formats import linear_kind, stored_bytes

if TYPE_CHECKING:
    from quant.encoding import Errors

REPORT_NAME = "report.json"
REPORT_FORMAT, REPORT_VERSION = "dsr1-report", 1
DIGITS = 6  # that count: sums of another number of threads differ beyond
EXPERT_KINDS = {"w1": "experts gate_up", "w3": "experts gate_up", "w2": "experts down"}


@dataclass(frozen=True)
class ImportanceSummary:
    """kind: "text" or "imatrix". name: the file. tokens: that were read, 0 if unknown.

    rare: so many of `experts` saw too few tokens and got their layer's mean squares. missing: matrices that are encoded
    without.
    """

    kind: str
    name: str
    tokens: int
    rare: int
    experts: int
    missing: int


Stored = tuple[str, str]  # a tensor's name and its format's


@dataclass(frozen=True)
class Line:
    """A tensor in one format, or a component in one: bytes, weights, and errors (None where they were not measured)."""

    name: str
    component: str
    format: str
    nbytes: int
    weights: int
    nmse: float | None
    weighted_nmse: float | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Report:
    """components: in the order of the model. tensors: worst first. calibration: None without."""

    recipe: str
    calibration: ImportanceSummary | None
    components: tuple[Line, ...]
    tensors: tuple[Line, ...]

    def to_json(self) -> bytes:
        """The same report always gives the same bytes."""
        fields: dict[str, Any] = {
            "format": REPORT_FORMAT,
            "version": REPORT_VERSION,
            "recipe": self.recipe,
            "calibration": None if self.calibration is None else asdict(self.calibration),
        }
        for kind, lines in (("components", self.components), ("tensors", self.tensors)):
            fields[kind] = [asdict(line) | {"bits_per_weight": _rounded(line.bits_per_weight)} for line in lines]
        return (json.dumps(fields, separators=(",", ":")) + "\n").encode()


def component_of(spec: TensorSpec) -> str:
    """The part of a recipe that a packed tensor belongs to."""
    return EXPERT_KINDS[spec.name.rpartition(".")[2]] if spec.expert is not None else linear_kind(spec)


def make_report(
    inventory: Inventory, recipe: str, errors: Mapping[Stored, "Errors"], calibration: ImportanceSummary | None
) -> Report:
    """errors: of every packed tensor in every format; empty ones where a tensor was encoded by an earlier run."""
    calibrated, groups = calibration is not None, dict[Stored, list[tuple[TensorSpec, "Errors"]]]()
    tensors = []
    for (name, representation), found in errors.items():
        spec = inventory.by_name[name]
        groups.setdefault((component_of(spec), representation), []).append((spec, found))
        tensors.append(_line(name, representation, [(spec, found)], calibrated))
    components = [
        _line(component, representation, some, calibrated) for (component, representation), some in groups.items()
    ]
    return Report(recipe, calibration, tuple(components), tuple(sorted(tensors, key=_badness)))


def _badness(line: Line) -> tuple[float, str]:
    error = line.weighted_nmse if line.weighted_nmse is not None else line.nmse
    return -(error or 0.0), line.name


def _line(name: str, representation: str, parts: Iterable[tuple[TensorSpec, "Errors"]], calibrated: bool) -> Line:
    component, nbytes, weights, total, known = "", 0, 0, [0.0] * 4, True
    for spec, errors in parts:
        nbytes, weights = nbytes + stored_bytes(representation, spec.shape), weights + spec.parameters
        known = known and errors.measured
        total = [one + other for one, other in zip(total, errors.sums, strict=True)]
        component = component_of(spec)
    nmse = _share(total[1], total[0]) if known else None
    weighted = _share(total[3], total[2]) if known and calibrated else None
    return Line(name, component, representation, nbytes, weights, nmse, weighted)


def _share(part: float, whole: float) -> float:
    return _rounded(part / whole) if whole else 0.0


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def read_report(folder: Path) -> Report | None:
    """The report of a store; None if there is none, or one of another kind."""
    try:
        fields = json.loads((folder / REPORT_NAME).read_bytes())
        if (fields["format"], fields["version"]) != (REPORT_FORMAT, REPORT_VERSION):
            return None
        made = fields["calibration"]
        lines = [tuple(_parsed(line) for line in fields[kind]) for kind in ("components", "tensors")]
        return Report(fields["recipe"], None if made is None else ImportanceSummary(**made), *lines)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _parsed(fields: dict[str, Any]) -> Line:
    line = Line(**{key: value for key, value in fields.items() if key != "bits_per_weight"})
    if (
        not isinstance(line.name, str)
        or type(line.weights) is not int
        or line.weights < 1
        or type(line.nbytes) is not int
    ):
        raise ValueError("a report's line has values of other types")
    return line

"""A machine as data: what the cost model (offload/costs.py) needs to know of its processor, memory and GPU.

measured   offload/probe.py, kept with its date in the cache folder      dsr1 doctor --measure
shipped    offload/machines/NAME.json, from data sheets and kernels' times on a core of the same instruction set
a file     the same JSON, of any machine                                 dsr1 plan --hardware FILE
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from quant.errors import Dsr1Error

MACHINE_VERSION = 2
MACHINES = Path(__file__).parent / "machines"
MOST_BYTES = 2**20  # of a machine's file
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class MachineGpu:
    """memory: bytes. read_bytes_s: of its memory. flops: bfloat16 operations a second, dense.

    to_gpu_bytes_s, to_host_bytes_s: over PCIe. capability: "8.9"; empty if it is not known.
    """

    name: str
    memory: int
    read_bytes_s: float
    flops: float
    to_gpu_bytes_s: float
    to_host_bytes_s: float
    capability: str = ""


def block_ns(points: Points, tokens: float) -> float:
    """Time of one core for a block of 16 x 128 weights that `tokens` tokens use; straight lines between points."""
    if tokens <= points[0][0]:
        return points[0][1]
    before, after = points[0], points[-1]
    for first, second in zip(points, points[1:], strict=False):
        before, after = first, second
        if tokens <= second[0]:
            break
    if before == after:
        return before[1] * tokens / before[0]
    slope = (after[1] - before[1]) / (after[0] - before[0])
    return before[1] + slope * (tokens - before[0])


@dataclass(frozen=True)
class Machine:
    """Times are those of one core while all others work, too, with weights from memory; rates are of the whole machine.

    source: where the figures are from. date: of the measurement, empty for data sheets. cores: that run kernels.
    nodes: of NUMA. ram: bytes. read_bytes_s: plain reading of memory with all cores.
    experts, matrices: for a format, how long a block of 16 x 128 weights of a layer of experts, or of another matrix,
    takes: (tokens that use it, ns), ascending. expert_output_ns, matrix_output_ns: besides, of each token's result.
    experts_s, matrix_s: besides, of a kernel of either. heads_ns: of a block of packed wkv_b in absorbed attention.
    absorbed_ns, decompressed_ns: of a multiplication in either form of attention.
    call_s: of a small kernel. eager_s: of an operator beside its kernels, where no recording is played (quant/tape.py).
    value_ns: of a value that a small step reads and writes.
    """

    name: str
    source: str
    date: str
    cores: int
    isa: str
    nodes: int
    ram: int
    read_bytes_s: float
    experts: Mapping[str, Points]
    matrices: Mapping[str, Points]
    expert_output_ns: float
    matrix_output_ns: float
    experts_s: float
    matrix_s: float
    call_s: float
    eager_s: float
    value_ns: float
    heads_ns: float
    absorbed_ns: float
    decompressed_ns: float
    gpu: MachineGpu | None = None
    version: int = MACHINE_VERSION

    def to_json(self) -> str:
        """The text of a machine's file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_fields(cls, found: Any, where: str) -> Self:
        """The machine that parsed JSON describes. Raises Dsr1Error naming the field that is wrong."""
        if not isinstance(found, dict) or found.get("version") != MACHINE_VERSION:
            raise Dsr1Error(f"{where} is not a machine of version {MACHINE_VERSION}; {REMEDY}")
        _check_names(found, {f.name for f in fields(cls)}, where)
        numbers = [f.name for f in fields(cls) if f.type in (int, float) and f.name != "version"]
        values: dict[str, Any] = {name: _positive(found, name, where) for name in numbers}
        values |= {name: _text(found, name, where) for name in ("name", "source", "date", "isa")}
        values |= {name: math.ceil(values[name]) for name in ("cores", "nodes", "ram")}
        values |= {name: _formats(found[name], f"{where}: {name}") for name in ("experts", "matrices")}
        gpu = found.get("gpu")
        return cls(**values, gpu=None if gpu is None else _gpu(gpu, f"{where}: gpu"))


def mean_of(first: Machine, second: Machine) -> Machine:
    """One machine as it was measured twice: the mean of each figure. The rest is the second's."""
    rates = [f.name for f in fields(Machine) if f.type is float]
    means = {name: (getattr(first, name) + getattr(second, name)) / 2 for name in rates}
    experts, matrices = _mean_table(first.experts, second.experts), _mean_table(first.matrices, second.matrices)
    return replace(second, experts=experts, matrices=matrices, **means)


def _mean_table(first: Mapping[str, Points], second: Mapping[str, Points]) -> dict[str, Points]:
    return {
        name: tuple((tokens, (ns + other) / 2) for (tokens, ns), (_, other) in zip(points, second[name], strict=True))
        for name, points in first.items()
    }


REMEDY = "copy a file of offload/machines/ and change its figures, or let `dsr1 doctor --measure` write one"


def named_machines() -> list[str]:
    """Names of the machines that ship."""
    return sorted(path.stem for path in MACHINES.glob("*.json"))


def load_machine(name: str) -> Machine:
    """A machine by its shipped name, or of a file. Raises Dsr1Error if there is none, or its file is damaged."""
    shipped = MACHINES / f"{name}.json"
    path = shipped if name in named_machines() else Path(name).expanduser()
    if not path.is_file():
        raise Dsr1Error(f"there is no machine {name!r}; give a file, or one of {', '.join(named_machines())}")
    return read_machine(path)


def read_machine(path: Path) -> Machine:
    """The machine of a file. Raises Dsr1Error if it is damaged."""
    if path.stat().st_size > MOST_BYTES:
        raise Dsr1Error(f"{path} is too large to describe a machine; {REMEDY}")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise Dsr1Error(f"{path} is not JSON; {REMEDY}") from None
    return Machine.from_fields(found, str(path))


def _gpu(found: Any, where: str) -> MachineGpu:
    if not isinstance(found, dict):
        raise Dsr1Error(f"{where} must be an object; {REMEDY}")
    _check_names(found, {f.name for f in fields(MachineGpu)}, where)
    return MachineGpu(
        name=_text(found, "name", where),
        memory=math.ceil(_positive(found, "memory", where)),
        read_bytes_s=_positive(found, "read_bytes_s", where),
        flops=_positive(found, "flops", where),
        to_gpu_bytes_s=_positive(found, "to_gpu_bytes_s", where),
        to_host_bytes_s=_positive(found, "to_host_bytes_s", where),
        capability=str(found.get("capability", "")),
    )


def _check_names(found: dict[str, Any], known: set[str], where: str) -> None:
    missing = sorted(known - {"gpu", "capability"} - found.keys())
    if unknown := sorted(found.keys() - known):
        raise Dsr1Error(f"{where} has a field {unknown[0]!r} that this version does not know; {REMEDY}")
    if missing:
        raise Dsr1Error(f"{where} has no field {missing[0]!r}; {REMEDY}")


def _positive(found: dict[str, Any], name: str, where: str) -> float:
    value = found[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise Dsr1Error(f"{where}: {name} is {value!r}; it must be a number above 0")
    return float(value)


def _text(found: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(found[name], str):
        raise Dsr1Error(f"{where}: {name} must be a text; {REMEDY}")
    return str(found[name])


def _formats(found: Any, where: str) -> dict[str, Points]:
    if not isinstance(found, dict) or not found:
        raise Dsr1Error(f"{where} must be an object of formats; {REMEDY}")
    return {str(name): _points(points, f"{where}.{name}") for name, points in found.items()}


def _points(found: Any, where: str) -> Points:
    """Ascending pairs of tokens and ns."""
    pairs = found if isinstance(found, list) and found else [None]
    points = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Dsr1Error(f"{where} must be pairs [tokens, ns]; {REMEDY}")
        tokens, ns = (_positive({"": value}, "", where) for value in pair)
        points.append((tokens, ns))
    if any(before[0] >= after[0] for before, after in zip(points, points[1:], strict=False)):
        raise Dsr1Error(f"{where} must be pairs with ascending numbers of tokens; {REMEDY}")
    return tuple(points)

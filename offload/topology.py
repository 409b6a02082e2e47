"""NUMA nodes: which memory is near which processors. Asked of /sys and /proc; neither numactl nor libnuma is needed."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from offload.hardware import allowed_cpus

ROOT = Path("/")
NODES = "sys/devices/system/node"
MEMINFO_LINE = re.compile(r"^Node \d+ (\S+):\s+(\d+) kB$", re.MULTILINE)
RECLAIMABLE = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")


@dataclass(frozen=True)
class Node:
    """Memory of its own and the processors that are nearest to it.

    number: Linux's. nbytes: all its memory. available: what is free there, pages of files included.
    """

    number: int
    cpus: tuple[int, ...]
    nbytes: int
    available: int


@dataclass(frozen=True)
class Topology:
    """The nodes that this process may use, at least one."""

    nodes: tuple[Node, ...]

    @property
    def available(self) -> tuple[int, ...]:
        """Bytes that each node has left."""
        return tuple(node.available for node in self.nodes)


def read_topology(root: Path = ROOT, allowed: Collection[int] | None = None) -> Topology:
    """The nodes with memory and processors that this process may use; one node where Linux does not tell.

    root: where /proc and /sys are. allowed: processors, by default those that this process may run on. Processors of
    a node without memory count to the nearest node that has some.
    """
    cpus = frozenset(allowed_cpus() if allowed is None else allowed)
    near = {number: sorted(cpus.intersection(_cpus(root, number))) for number in _node_numbers(root)}
    memory = {number: _memory(root, number) for number in near}
    usable = [number for number, own in near.items() if own and memory[number][0] and _may_use(root, number)]
    owned = {number: list(near[number]) for number in usable}
    for number, own in near.items():
        if owned and number not in owned:
            owned[_nearest(root, number, list(near), usable)] += own
    nodes = tuple(Node(number, tuple(own), *memory[number]) for number, own in owned.items())
    return Topology(nodes or (Node(0, tuple(sorted(cpus)), 0, 0),))


def parse_list(text: str) -> list[int]:
    """The numbers of "0-3,8", as Linux writes sets of processors and nodes."""
    numbers: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _node_numbers(root: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("node")) for folder in (root / NODES).glob("node[0-9]*"))


def _cpus(root: Path, number: int) -> list[int]:
    return parse_list(_read(root / NODES / f"node{number}/cpulist"))


def _memory(root: Path, number: int) -> tuple[int, int]:
    """All bytes of a node, and those that are free or can be freed at once."""
    kib = {name: int(count) for name, count in MEMINFO_LINE.findall(_read(root / NODES / f"node{number}/meminfo"))}
    return kib.get("MemTotal", 0) * 2**10, sum(kib.get(name, 0) for name in RECLAIMABLE) * 2**10


def _may_use(root: Path, number: int) -> bool:
    """Whether a container lets this process have a node's memory."""
    allowed = re.search(r"^Mems_allowed_list:\s+(\S+)$", _read(root / "proc/self/status"), re.MULTILINE)
    return allowed is None or number in parse_list(allowed[1])


def _nearest(root: Path, number: int, numbers: list[int], usable: list[int]) -> int:
    """The usable node with the smallest distance; the file has one for each node."""
    distances = map(int, _read(root / NODES / f"node{number}/distance").split())
    near = dict(zip(numbers, distances, strict=False))
    return min(usable, key=lambda other: near.get(other, 0))

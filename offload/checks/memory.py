"""RAM, and the settings of Linux that decide how much of it a model may use."""

import re
from pathlib import Path

from offload.checks.check import Check, read_text
from offload.sizes import format_size
from offload.topology import Topology

SWAP_IN_USE = 2**28  # bytes; a little is swapped out on every machine
STRICT_OVERCOMMIT = "2"
EVEN_SHARE = 0.75  # of all free RAM; as experts are split evenly, the fullest node decides how much of it they get


def ram(total: int, available: int, limit: int | None, usable: int) -> Check:
    """Bytes. limit: of the container, None without one. usable: what dsr1 takes unless told with --ram."""
    value = f"{format_size(total)}, {format_size(available)} available"
    if limit is not None:
        value += f", {format_size(limit)} allowed by the container"
    value += f", {format_size(usable)} for dsr1"
    if usable:
        return Check("RAM", value)
    return Check("RAM", value, "problem", "close other programs, or raise the container's limit")


def locked_memory(limit: int | None) -> Check:
    """limit: bytes that this process may keep from being paged out; None without one."""
    if limit is None:
        return Check("locked memory", "unlimited; --residency locked keeps a store's experts in RAM")
    return Check("locked memory", f"up to {format_size(limit)}; --residency locked needs as much as a store's experts")


def huge_pages(root: Path) -> Check | None:
    """Whether copied experts get them."""
    setting = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting)
    if chosen is None:
        return None
    if chosen[1] != "never":
        return Check("huge pages", f"{chosen[1]}; --residency copied asks for them")
    remedy = (
        "copied experts are read a little slower; `echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`"
    )
    return Check("huge pages", "never", "attention", remedy)


def overcommit(root: Path) -> Check | None:
    setting = read_text(root / "proc/sys/vm/overcommit_memory")
    if not setting:
        return None
    if setting != STRICT_OVERCOMMIT:
        return Check("overcommit", setting)
    memory = _meminfo(root)
    value = f"2 (strict): {format_size(memory.get('Committed_AS', 0))} of {format_size(memory.get('CommitLimit', 0))}"
    remedy = "mapped files of a model count there, though no memory is taken; `sudo sysctl vm.overcommit_memory=0`"
    return Check("overcommit", value, "attention", remedy)


def swap(root: Path) -> Check | None:
    memory = _meminfo(root)
    if "SwapTotal" not in memory:
        return None
    total, used = memory["SwapTotal"], memory["SwapTotal"] - memory.get("SwapFree", 0)
    value = f"{format_size(used)} of {format_size(total)} in use" if total else "none"
    if used < SWAP_IN_USE:
        return Check("swap", value)
    return Check(
        "swap", value, "attention", "RAM was short here; close what else needs much of it before a large model"
    )


def numa(topology: Topology) -> Check | None:
    """Nodes with memory and processors that this process may use. None where Linux does not tell."""
    nodes = topology.nodes
    if not nodes[0].nbytes:
        return None
    if len(nodes) == 1:
        return Check("NUMA nodes", "1")
    told = ", ".join(f"{format_size(node.available)} of {format_size(node.nbytes)} free" for node in nodes)
    room = len(nodes) * min(topology.available)
    value = f"{len(nodes)}: {told}; a store's experts, up to {format_size(room)}, are split over them"
    if room >= EVEN_SHARE * sum(topology.available):
        return Check("NUMA nodes", value)
    remedy = "experts that do not fit stay mapped and are read across nodes; free RAM on the fullest node"
    return Check("NUMA nodes", value, "attention", remedy)


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", read_text(root / "proc/meminfo"), re.MULTILINE)
    return {name: int(kib) * 2**10 for name, kib in found}

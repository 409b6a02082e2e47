"""RAM, and the settings of Linux that decide how much of it a model may use."""

import re
from pathlib import Path

from offload.checks.check import Check, read_text
from offload.sizes import format_size

SWAP_IN_USE = 2**28  # bytes; a little is swapped out on every machine
STRICT_OVERCOMMIT = "2"


def ram(total: int, available: int, limit: int | None, usable: int) -> Check:
    """Bytes. limit: of the container, None without one. usable: what dsr1 takes unless told with --ram."""
    value = f"{format_size(total)}, {format_size(available)} available"
    if limit is not None:
        value += f", {format_size(limit)} allowed by the container"
    value += f", {format_size(usable)} for dsr1"
    if usable:
        return Check("RAM", value)
    return Check("RAM", value, "problem", "close other programs, or raise the container's limit")


def locked_memory() -> Check | None:
    """How much this process may keep from being paged out. None off Unix."""
    try:
        import resource
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    allowed = "unlimited" if limit == resource.RLIM_INFINITY else f"up to {format_size(limit)}"
    return Check("locked memory", f"{allowed}; this version locks none")


def huge_pages(root: Path) -> Check | None:
    setting = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting)
    if chosen is None:
        return None
    return Check("huge pages", f"{chosen[1]}; models run from mapped files, which do not ask for them")


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


def numa(root: Path) -> Check | None:
    """Nodes with memory of their own. None where Linux does not tell."""
    files = sorted((root / "sys/devices/system/node").glob("node[0-9]*/meminfo"), key=_node_number)
    sizes = [_node_bytes(read_text(file)) for file in files]
    with_memory = [size for size in sizes if size]
    if not with_memory:
        return None
    if len(with_memory) == 1:
        return Check("NUMA nodes", "1")
    value = f"{len(with_memory)}: {', '.join(format_size(size) for size in with_memory)}"
    remedy = (
        "this version does not place weights by node; `numactl --interleave=all dsr1 ...`, with the model not yet in "
        "the page cache, spreads them evenly"
    )
    return Check("NUMA nodes", value, "attention", remedy)


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", read_text(root / "proc/meminfo"), re.MULTILINE)
    return {name: int(kib) * 2**10 for name, kib in found}


def _node_number(meminfo: Path) -> int:
    return int(meminfo.parent.name.removeprefix("node"))


def _node_bytes(meminfo: str) -> int:
    total = re.search(r"MemTotal:\s+(\d+) kB", meminfo)
    return int(total[1]) * 2**10 if total else 0

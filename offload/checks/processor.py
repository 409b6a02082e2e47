"""The processor: cores, and the instruction sets that the kernels use."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from offload.checks.check import Check, read_text
from quant.isa import X86, request_tiles

TILE_FLAGS = {"amx_tile", "amx_int8"}


def processor(root: Path) -> Check:
    name = _first_processor(root).get("model name") or platform.processor()
    return Check("processor", f"{name} ({platform.machine()})" if name else platform.machine())


def cores(allowed: int, total: int, quota: float | None) -> Check:
    """allowed: processors that this process may run on. quota: cores' worth of time that a container has."""
    value = f"{allowed} of {total} may be used"
    if quota is None or quota >= allowed:
        return Check("cores", value)
    threads = max(1, int(quota))
    remedy = f"give --threads {threads}; with more, the system stops all threads again and again"
    return Check("cores", f"{value}, but only for the time of {quota:.1f}", "attention", remedy)


def instruction_sets(names: Sequence[str], numba_cpu: str | None) -> Check:
    """names: of those there are, the best first. numba_cpu: NUMBA_CPU_NAME, which overrides the processor."""
    value = f"kernels use {names[0]}" + (f"; --isa can choose {', '.join(names[1:])}" if names[1:] else "")
    if numba_cpu:
        remedy = "unset it, so that kernels use all that the processor has"
        return Check("instruction sets", f"{value}; NUMBA_CPU_NAME is {numba_cpu}", "attention", remedy)
    if len(names) == 1 and X86:
        remedy = "kernels run, but slowly; take a processor with AVX2, or let the virtual machine see the host's"
        return Check("instruction sets", value, "attention", remedy)
    return Check("instruction sets", value)


def amx(root: Path, request: Callable[[], bool] = request_tiles) -> Check | None:
    """Whether AMX is there, and the system grants it. None off x86."""
    flags = _flags(root)
    if not flags:
        return None
    if not flags >= TILE_FLAGS:
        return Check("AMX", "no")
    if request():
        return Check("AMX", "yes, and granted by the system; kernels use it")
    remedy = "kernels do without; take Linux 5.16 or newer, and a container that allows arch_prctl"
    return Check("AMX", "yes, but not granted by the system", "attention", remedy)


def _first_processor(root: Path) -> dict[str, str]:
    """The fields of the first processor of /proc/cpuinfo; empty if that is missing."""
    block, *_ = read_text(root / "proc/cpuinfo").split("\n\n")
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _flags(root: Path) -> set[str]:
    return set(_first_processor(root).get("flags", "").split())

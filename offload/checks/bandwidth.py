"""How fast this machine reads its memory, which bounds how fast a model decodes. The one check that needs Numba."""

import os

from offload.checks.check import Check
from offload.hardware import allowed_cores
from offload.sizes import format_size

MEASURED_BYTES = 3 * 2**30  # more than caches hold
ONE_CHANNEL = 20e9  # bytes a second; DDR4-3200 gives 25.6, DDR5 more
BUSY_SHARE = 0.25  # of the cores, in use by other programs


def bandwidth(usable: int) -> Check:
    """Read anonymous memory in all ways that there are, and tell the fastest. usable: bytes of RAM."""
    import torch

    from offload.benchmark.limits import fastest_read
    from offload.memory import huge_memory
    from quant.kernels.bandwidth import PAGE
    from quant.kernels.threads import set_threads, thread_count

    pages = min(MEASURED_BYTES, usable // 2) // PAGE
    if not pages:
        return Check("bandwidth", "no RAM to measure it with", "problem", "close other programs")
    busy = _load() > BUSY_SHARE * allowed_cores()
    set_threads(allowed_cores())
    memory = huge_memory(pages * PAGE).fill_(1)  # written, so that every page is there
    _, runs = fastest_read(torch.tensor([[memory.data_ptr(), pages]]))
    speed = f"{runs.bytes_s / 1e9:.1f} GB/s"
    how = f"reading {format_size(memory.nbytes)} with {thread_count()} threads"
    value = f"{speed}, {how}; `dsr1 plan` says how much of a model a token reads"
    if not busy:
        return _judged(value, runs.bytes_s)
    return Check("bandwidth", value, "attention", "other programs keep this machine busy; measure again without them")


def _judged(value: str, bytes_s: float) -> Check:
    if bytes_s >= ONE_CHANNEL:
        return Check("bandwidth", value)
    remedy = "so slow is one memory channel: are modules in the slots of the others, too? (`sudo dmidecode -t memory`)"
    return Check("bandwidth", value, "attention", remedy)


def _load() -> float:
    """Threads that wanted to run in the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0

"""How many threads kernels use. Results never depend on it: one thread computes an output element wholly."""

import threading
from typing import Any

import numba
import torch

from quant.kernels.jit import Kernel

MAX_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
# A parallel region costs tens of microseconds, a million multiplications about as much.
SERIAL_MULTIPLICATIONS = 1 << 20

_lock = threading.Lock()  # Numba's workqueue threads cannot serve two callers; two at once would also oversubscribe
_count = 0


def set_threads(count: int) -> None:
    """Let kernels use `count` threads: at least 1, at most the processors that Numba found at its import."""
    global _count
    if count < 1:
        raise ValueError(f"{count} threads cannot run kernels; give at least 1")
    _count = min(count, MAX_THREADS)


def thread_count() -> int:
    """The threads that a large kernel uses. Until set_threads is called: as many as torch uses."""
    return _count or min(torch.get_num_threads(), MAX_THREADS)


def parts_for(multiplications: int) -> int:
    """Threads for a task of this size: 1 if a parallel region costs more than it gains."""
    return 1 if multiplications < SERIAL_MULTIPLICATIONS else thread_count()


def call(kernel: Kernel, args: tuple[int, ...], parts: int) -> Any:
    """Run a kernel, whose last argument is the number of parts to share its work out to."""
    if parts == 1:
        return kernel(*args, 1)
    with _lock:
        before = numba.get_num_threads()
        numba.set_num_threads(min(parts, MAX_THREADS))
        try:
            return kernel(*args, parts)
        finally:
            numba.set_num_threads(before)

"""Compile the kernels that some work needs before it begins, instead of at their first calls in the middle of it.

Numba compiles one kernel at a time in a process. So a helper process compiles, too, and hands its kernels over through
the cache on disk: this process takes kernels from the front of a list, the most expensive first, the helper from its
end. What the helper does not hand over is compiled here in the end.

    this process                       helper
    starts the helper                  imports what kernels need, prints a line
    writes "module kernel"             compiles it, prints a line
    closes the pipe or kills it        ends
"""

import importlib
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from quant import isa
from quant.kernels.absorbed import attend_absorbed
from quant.kernels.bandwidth import multiply_kernel, multiply_tiles_kernel, read_kernel
from quant.kernels.decode import decode
from quant.kernels.decompressed import attend_block
from quant.kernels.elementwise import add, convert, copy_rows, silu_times
from quant.kernels.encode import encode
from quant.kernels.jit import COMPILABLE, Compilable
from quant.kernels.linear import linear
from quant.kernels.moe import moe_experts
from quant.kernels.norm import rms_norm
from quant.kernels.packed_linear import packed_linear
from quant.kernels.packed_moe import packed_moe_experts
from quant.kernels.rope import turn_pairs
from quant.kernels.router import route
from quant.kernels.threads import MAX_THREADS, POOL_KERNELS
from quant.progress import Steps, untold

# The most expensive first.
SMALL_KERNELS = (rms_norm, turn_pairs, convert, copy_rows, add, silu_times)
MODEL_KERNELS = (linear, attend_block, attend_absorbed, route, *SMALL_KERNELS)  # for every model
PACKED_KERNELS = (packed_moe_experts, packed_linear, *MODEL_KERNELS, decode)  # for a store
PLAIN_KERNELS = (moe_experts, *MODEL_KERNELS)  # for a published checkpoint
ENCODING_KERNELS = (encode,)
MEASURING_KERNELS = (read_kernel, multiply_kernel, multiply_tiles_kernel)

HELPER = """
import sys
sys.path[:] = sys.argv[2:]
from quant.isa import force
force(sys.argv[1])
from quant.kernels.ahead import serve
serve(sys.stdin)
"""


def compile_ahead(kernels: Sequence[Compilable], report: Steps = untold) -> None:
    """Have `kernels`, the most expensive first, ready to run. `report` is called only if some were never compiled."""
    kernels = (*kernels, *POOL_KERNELS)
    missing = [kernel for kernel in kernels if not kernel.ready]
    if missing:
        _Compilation(missing, report).run()
    for kernel in kernels:
        kernel.compile()
    if missing:
        report(len(missing), len(missing))


class _Compilation:
    """Kernels that are not on disk, and how many of them are."""

    def __init__(self, kernels: Sequence[Compilable], report: Steps):
        self._waiting, self._total, self._report = deque(kernels), len(kernels), report
        self._lock = threading.Lock()  # of what follows and of `_waiting`
        self._done, self._helper_is_busy = 0, False

    def run(self) -> None:
        self._report(0, self._total)
        helper = None if self._total == 1 or MAX_THREADS == 1 else _start_helper()
        if helper is None:
            self._compile_here()
            return
        feeder = threading.Thread(target=self._feed, args=(helper,), daemon=True)
        feeder.start()
        try:
            self._compile_here()
            with self._lock:
                if not self._helper_is_busy:  # it may not even have begun
                    helper.kill()
            feeder.join()
        finally:
            helper.kill()
            helper.wait()

    def _compile_here(self) -> None:
        while self._waiting:
            with self._lock:
                kernel = self._waiting.popleft() if self._waiting else None
            if kernel is not None:
                kernel.compile()
                self._finish()

    def _feed(self, helper: "subprocess.Popen[str]") -> None:
        """Give the helper one kernel after the other, for as long as it hands them over."""
        assert helper.stdin is not None and helper.stdout is not None
        try:
            begun = helper.stdout.readline()
            while begun and (kernel := self._take_for_helper()) is not None:
                helper.stdin.write(f"{kernel.function.__module__} {kernel.name}\n")
                helper.stdin.flush()
                if not helper.stdout.readline() or not kernel.ready:
                    return
                self._finish()
            helper.stdin.close()
        except OSError:  # it is gone
            return
        finally:
            self._helper_is_busy = False

    def _take_for_helper(self) -> Compilable | None:
        with self._lock:
            kernel = self._waiting.pop() if self._waiting else None
            self._helper_is_busy = kernel is not None
        return kernel

    def _finish(self) -> None:
        with self._lock:
            self._done += 1
            self._report(self._done, self._total)


def _start_helper() -> "subprocess.Popen[str] | None":
    if getattr(sys, "frozen", False) or not sys.executable:  # Python inside of another program
        return None
    command = [sys.executable, "-c", HELPER, isa.current(), *sys.path]
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    except OSError:  # no more processes, or no memory for one
        return None


def serve(tasks: Iterable[str]) -> None:
    """Be the helper: compile the kernels that `tasks` names, a line each."""
    print("ready", flush=True)
    for task in tasks:
        module, name = task.split()
        importlib.import_module(module)
        COMPILABLE[name].compile()
        print(name, flush=True)

"""Threads that run kernels: started once, asleep when there is nothing to do, woken for each kernel call.

How a kernel is run by `parts` threads, of which the caller is number 0:

    caller                                        worker 1 ... parts - 1
    write function, arguments; counters = 0       wait until JOB changes (spin, then sleep)
    JOB = a new number and `parts`, wake          run the kernel, if `parts` is above the worker's number
    run the kernel as part 0                      add its result to TOTAL; DONE += 1; the last one wakes the caller
    wait until DONE = parts - 1

The caller does not write the next job before all that take part in this one are done; a worker sees in the word JOB
itself whether it takes part, so one that does not may come late. Without futexes workers sleep in Python, until the
caller tells those that take part which JOB is about to change.

Results never depend on the number of threads: each output element is computed by one thread, in one order.
"""

import os
import threading
from array import array
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
import torch

from quant.kernels.atomics import FUTEX, add_integer, add_word, call_address, load_word, store_word
from quant.kernels.jit import Kernel, compiled_once, inner
from quant.kernels.team import COUNTER_COUNT, COUNTERS, LINE, SYNC_BYTES, wait_for_change, wake
from quant.kernels.tiles import integers

MAX_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
# Waking threads costs some microseconds, a hundred thousand multiplications about as much.
SERIAL_MULTIPLICATIONS = 1 << 17

# Bytes from the start of the words that all threads share.
JOB, JOB_SLEEPERS, DONE, DONE_SLEEPERS, TOTAL, WORK = (SYNC_BYTES + LINE * line for line in range(6))
STATE_BYTES = WORK + LINE
PARTS_BITS = 10  # of JOB; the others are the job's number
PARTS_MASK = (1 << PARTS_BITS) - 1

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
    """Threads for a task of this size: 1 if waking others costs more than it gains."""
    return 1 if multiplications < SERIAL_MULTIPLICATIONS else thread_count()


@compiled_once("int64(int64, int64, int64)")
def _work(state, number, seen):  # type: ignore[no-untyped-def]
    """A worker's life: each job that comes after `seen`. Without futexes, that one job, in which it takes part."""
    job, sleepers = state + JOB, state + JOB_SLEEPERS
    while True:
        seen = wait_for_change(job, seen, sleepers)
        parts = seen & PARTS_MASK
        if number < parts:
            work = integers(state + WORK, (2,))
            add_integer(state + TOTAL, call_address(work[0], work[1], number, parts, state))
            if add_word(state + DONE, 1) == parts - 2:
                wake(state + DONE, state + DONE_SLEEPERS)
        if FUTEX == 0:
            return seen


@inner
def _run_kernel(state, function, arguments, parts):  # type: ignore[no-untyped-def]
    """Run a kernel with `parts` threads; the sum of what it returns in each of them."""
    for counter in range(COUNTER_COUNT):
        store_word(state + COUNTERS + counter * LINE, 0)
    if parts == 1:
        return call_address(function, arguments, 0, 1, state)
    work, total = integers(state + WORK, (2,)), integers(state + TOTAL, (1,))
    work[0], work[1] = function, arguments
    total[0] = 0
    store_word(state + DONE, 0)
    store_word(state + JOB, (((load_word(state + JOB) >> PARTS_BITS) + 1) << PARTS_BITS) | parts)
    wake(state + JOB, state + JOB_SLEEPERS)
    result = call_address(function, arguments, 0, parts, state)
    done = load_word(state + DONE)
    while done < parts - 1:
        done = wait_for_change(state + DONE, done, state + DONE_SLEEPERS)
    return result + total[0]


@compiled_once("int64(int64, int64, int64, int64)")
def _run(state, function, arguments, parts):  # type: ignore[no-untyped-def]
    """One kernel."""
    return _run_kernel(state, function, arguments, parts)


@compiled_once("int64(int64, int64, int64)")
def _run_all(state, calls, count):  # type: ignore[no-untyped-def]
    """One kernel after the other. calls: address of int64 [count, 3], function, arguments and parts of each."""
    rows = integers(calls, (count, 3))
    for number in range(count):
        _run_kernel(state, rows[number, 0], rows[number, 1], rows[number, 2])
    return 0


class Pool:
    """The workers of this process and the memory that they share with callers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._words = np.zeros(STATE_BYTES + LINE, np.uint8)
        self.state = _aligned(self._words)
        self._alone = threading.local()
        self._workers: list[threading.Thread] = []
        self._posted: list[SimpleQueue[int]] = []  # the word JOB before a job of theirs

    def run(self, kernel: Kernel, arguments: tuple[int, ...], parts: int) -> int:
        """Run `kernel`; the sum of its results. Two callers at once take turns, unless one part is all they want."""
        values = array("q", arguments)
        address, function = values.buffer_info()[0], kernel.address
        if parts == 1:
            return int(_run(self._own_state(), function, address, 1))
        with self._lock:
            self._start_workers(parts - 1)
            if not FUTEX:
                self._post(parts)
            return int(_run(self.state, function, address, parts))

    def run_all(self, calls: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        """Run kernels one after the other: int64 [count, 3], their functions, addresses of arguments and parts."""
        with self._lock:
            self._start_workers(int(calls[:, 2].max(initial=1)) - 1)
            if FUTEX:
                _run_all(self.state, calls.ctypes.data, len(calls))
                return
            for function, arguments, parts in calls.tolist():
                self._post(parts)
                _run(self.state, function, arguments, parts)

    def _post(self, parts: int) -> None:
        """Where there are no futexes: send the workers of the next job to wait for it."""
        before = load_job(self.state)
        for posted in self._posted[: parts - 1]:
            posted.put(before)

    def _own_state(self) -> int:
        """Words of the calling thread alone."""
        if not hasattr(self._alone, "state"):
            self._alone.words = np.zeros(STATE_BYTES + LINE, np.uint8)
            self._alone.state = _aligned(self._alone.words)
        return int(self._alone.state)

    def _start_workers(self, count: int) -> None:
        while len(self._workers) < count:
            number = len(self._workers) + 1
            self._posted.append(SimpleQueue())
            args = (number, load_job(self.state), self._posted[-1])
            worker = threading.Thread(target=self._live, args=args, name=f"dsr1-kernel-{number}", daemon=True)
            self._workers.append(worker)
            worker.start()

    def _live(self, number: int, seen: int, posted: "SimpleQueue[int]") -> None:
        while True:
            _work(self.state, number, seen if FUTEX else posted.get())


def _aligned(words: np.ndarray[Any, Any]) -> int:
    """The first address in `words` that begins a cache line."""
    address = int(words.ctypes.data)
    return address + -address % LINE


@compiled_once("int64(int64)")
def load_job(state):  # type: ignore[no-untyped-def]
    """The word JOB."""
    return load_word(state + JOB)


POOL_KERNELS = (_work, _run, _run_all, load_job)  # which every call of a kernel needs
_pool = Pool()


def _forget_workers() -> None:
    """In the child of a fork: its parent's threads are not there."""
    global _pool
    _pool = Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def call(kernel: Kernel, arguments: tuple[int, ...], parts: int) -> int:
    """Run a kernel with `parts` threads, at most MAX_THREADS; the sum of what it returns in each of them."""
    return _pool.run(kernel, arguments, min(parts, MAX_THREADS))


def call_all(calls: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
    """Run kernels one after the other: int64 [count, 3], their functions, addresses of arguments and parts."""
    _pool.run_all(calls)

"""The threads that run kernels: each part runs once, all meet at barriers, and idle ones cost nothing."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.caching import NullCache

from quant.kernels import atomics, team, threads
from quant.kernels.atomics import add_integer, arguments_of, pause
from quant.kernels.jit import Kernel
from quant.kernels.team import COUNTER_COUNT, Team, barrier, take
from quant.kernels.threads import MAX_THREADS, call, call_all
from quant.kernels.tiles import integers
from tests.test_kernels import run_python

MOST_PARTS = max(4, MAX_THREADS)  # more than processors, maybe: then some sleep while others work
LINE = 8  # int64 of a cache line


class TestKernel(Kernel):
    """Not kept on disk, where it would outlive changes of this file."""

    __test__ = False

    def _make(self, cache: Any) -> Any:
        return super()._make(NullCache())


def _take_all(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """marks[n] += 1 for all numbers below `size` that this thread takes, `step` at a time; how many these are."""
    marks, size, step, counter = arguments_of(arguments, 4)
    crew, taken = Team(part, parts, sync), 0
    first = take(crew, counter, step)
    while first < size:
        for number in range(first, min(first + step, size)):
            add_integer(marks + 8 * number, 1)
            taken += 1
        first = take(crew, counter, step)
    return taken


def _meet(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """Rounds in which each thread writes its round's number, one of them late, and looks what all others wrote.

    How many of these are wrong.
    """
    written, rounds, lateness = arguments_of(arguments, 3)
    crew, seen, mistakes = Team(part, parts, sync), integers(written, (parts * LINE,)), 0
    for number in range(1, rounds + 1):
        if number % parts == part:
            for _ in range(lateness):
                pause()
        seen[part * LINE] = number
        barrier(crew)
        for other in range(parts):
            if seen[other * LINE] != number:
                mistakes += 1
        barrier(crew)
    return mistakes


def _tell_part(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    return 3**part


take_all, meet, tell_part = TestKernel(_take_all), TestKernel(_meet), TestKernel(_tell_part)


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.kernels.threads.MAX_THREADS", MOST_PARTS)


def marks_of(parts: int, size: int, step: int = 1, counter: int = 0) -> np.ndarray[Any, Any]:
    """How often each number was taken."""
    marks = np.zeros(size, np.int64)
    assert call(take_all, (marks.ctypes.data, size, step, counter), parts) == size
    return marks


def mistakes_of(parts: int, rounds: int, lateness: int) -> int:
    written = np.zeros(parts * LINE, np.int64)
    return call(meet, (written.ctypes.data, rounds, lateness), parts)


def test_every_part_runs_once() -> None:
    for parts in (*range(1, MOST_PARTS + 1), 2, 1, MOST_PARTS):
        assert call(tell_part, (), parts) == sum(3**part for part in range(parts))


def test_more_threads_than_there_may_be_are_not_started() -> None:
    assert call(tell_part, (), MOST_PARTS + 1) == call(tell_part, (), MOST_PARTS)


@pytest.mark.parametrize("parts", range(1, MOST_PARTS + 1))
def test_each_number_is_taken_once(parts: int) -> None:
    for size, step, counter in ((1, 1, 0), (100_000, 1, 3), (10_000, 7, COUNTER_COUNT - 1), (5, 100, 0)):
        assert (marks_of(parts, size, step, counter) == 1).all()


@pytest.mark.parametrize("parts", range(1, MOST_PARTS + 1))
@pytest.mark.parametrize("lateness", [0, 3 * team.SPINS])  # the others find it while they spin, or sleep
def test_nobody_passes_a_barrier_before_all_have_come(parts: int, lateness: int) -> None:
    assert mistakes_of(parts, 200, lateness) == 0


def test_many_kernels_in_one_call() -> None:
    """Each as its own call would run it, with all that the one before has done."""
    crews = [1 + number % MOST_PARTS for number in range(40)]
    marks = np.zeros((len(crews), 50), np.int64)
    arguments = np.array([(row.ctypes.data, 50, 1, 0) for row in marks])
    calls = [(take_all.address, row.ctypes.data, parts) for row, parts in zip(arguments, crews, strict=True)]
    call_all(np.array(calls))
    assert (marks == 1).all()
    call_all(np.empty((0, 3), np.int64))


def call_from_threads(times: int) -> None:
    """Calls of several sizes from four threads at once."""
    wrong: list[Any] = []

    def call_often(first: int) -> None:
        for number in range(times):
            parts = 1 + (first + number) % MOST_PARTS
            if not (marks_of(parts, 50) == 1).all() or mistakes_of(parts, 2, 0):
                wrong.append((first, number))

    callers = [threading.Thread(target=call_often, args=(first,)) for first in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_callers_on_several_threads_take_turns() -> None:
    call_from_threads(100)


def idle_seconds() -> float:
    """Processor time of this process in half a second after calls of several sizes, in which it has nothing to do."""
    for parts in (MOST_PARTS, 2, MOST_PARTS, 2, 2, 1):
        marks_of(parts, 100)
    time.sleep(0.05)  # they spin a little, and torch's threads do after other tests
    before = time.process_time()
    time.sleep(0.5)
    return time.process_time() - before


def test_idle_workers_cost_nothing() -> None:
    assert idle_seconds() < 0.05


WITHOUT_FUTEX = """
import tests.test_threads as it
from quant.kernels import atomics, team, threads
for module in (atomics, team, threads):
    module.FUTEX = 0  # nothing is compiled yet
threads.MAX_THREADS = it.MOST_PARTS = 3
it.test_every_part_runs_once()
for parts in (1, 2, 3, 2):
    assert (it.marks_of(parts, 1000) == 1).all()
    assert it.mistakes_of(parts, 3, 0) == it.mistakes_of(parts, 3, 3 * team.SPINS) == 0
it.test_many_kernels_in_one_call()
it.call_from_threads(10)
it.test_idle_workers_cost_nothing()
"""


def test_all_this_works_without_futexes(tmp_path: Path) -> None:
    run_python(WITHOUT_FUTEX, tmp_path)  # a cache of its own, whose key knows nothing of this


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_the_child_of_a_fork_has_workers_of_its_own() -> None:
    script = """
import os, warnings
warnings.simplefilter("ignore")  # that there are threads, which the child does without
import tests.test_threads as it
it.threads.MAX_THREADS = 3
def check():
    assert (it.marks_of(3, 1000) == 1).all() and it.mistakes_of(3, 20, 0) == 0
check()
child = os.fork()
if child == 0:
    try:
        check()
        os._exit(7)
    except BaseException:
        os._exit(1)
_, status = os.waitpid(child, 0)
check()
print(os.waitstatus_to_exitcode(status))
"""
    assert run_python(script) == "7\n"


def test_a_process_may_end_while_workers_sleep() -> None:
    script = """
import time
import tests.test_threads as it
it.threads.MAX_THREADS = 4
print(int(it.marks_of(4, 1000).sum()))
time.sleep(0.01)
"""
    assert run_python(script) == "1000\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="futexes are Linux's")
def test_linux_has_futexes() -> None:
    assert atomics.FUTEX and team.FUTEX == threads.FUTEX == atomics.FUTEX

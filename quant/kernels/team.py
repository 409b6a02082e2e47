"""The threads that run one kernel together, from inside the kernel: who one is, barriers, and sharing out work.

Every kernel is called as kernel(arguments, part, parts, sync) by each of `parts` threads: `arguments` is the address
of its int64 arguments, `sync` that of the words below, of which the caller has set the counters to 0. A thread that
waits spins for some microseconds, because it seldom waits longer, and then sleeps until it is woken: so idle threads
cost nothing, and programs that share a machine do not hold each other up.
"""

from typing import NamedTuple

from quant.kernels.atomics import (
    EVERYBODY,
    FUTEX,
    WAIT_PRIVATE,
    WAKE_PRIVATE,
    add_word,
    futex,
    load_word,
    pause,
    store_word,
)
from quant.kernels.jit import inner

LINE = 64  # bytes; each word has a cache line of its own
ARRIVED, PHASE, SLEEPERS, COUNTERS = (LINE * line for line in range(4))
COUNTER_COUNT = 32
SYNC_BYTES = COUNTERS + COUNTER_COUNT * LINE
SPINS = 1000  # pauses of about 40 nanoseconds on current processors: some 40 microseconds at most


class Team(NamedTuple):
    """One thread among those that run a kernel."""

    part: int
    parts: int
    sync: int


@inner
def wait_for_change(word, value, sleepers):  # type: ignore[no-untyped-def]
    """Return the word's value as soon as it is not `value`. sleepers: address of a count of those who sleep."""
    for _ in range(SPINS):
        now = load_word(word)
        if now != value:
            return now
        pause()
    while True:
        add_word(sleepers, 1)
        futex(word, WAIT_PRIVATE, value)  # returns at once if the word has changed
        add_word(sleepers, -1)
        now = load_word(word)
        if now != value:
            return now
        if FUTEX == 0:
            pause()


@inner
def wake(word, sleepers):  # type: ignore[no-untyped-def]
    """Wake all who wait for a change of `word`, after it was changed."""
    if load_word(sleepers) != 0:
        futex(word, WAKE_PRIVATE, EVERYBODY)


@inner
def barrier(team):  # type: ignore[no-untyped-def]
    """Return when all threads of the team are here; what they wrote before is seen by all after."""
    if team.parts == 1:
        return
    phase = load_word(team.sync + PHASE)
    if add_word(team.sync + ARRIVED, 1) == team.parts - 1:
        store_word(team.sync + ARRIVED, 0)
        store_word(team.sync + PHASE, phase + 1)
        wake(team.sync + PHASE, team.sync + SLEEPERS)
    else:
        wait_for_change(team.sync + PHASE, phase, team.sync + SLEEPERS)


@inner
def take(team, counter, count):  # type: ignore[no-untyped-def]
    """The first of the next `count` numbers that nobody has taken from `counter` (below COUNTER_COUNT)."""
    return add_word(team.sync + COUNTERS + counter * LINE, count)

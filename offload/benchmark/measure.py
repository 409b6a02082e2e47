"""Runs of several kinds that alternate, so that all meet the same moods of a shared machine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, median_low, quantiles


@dataclass(frozen=True)
class Effort:
    """How long to measure: until `seconds` have passed, but at least `least` (2 or more) and at most `most` runs."""

    seconds: float = 3.0
    least: int = 5
    most: int = 50


@dataclass(frozen=True)
class Run:
    """One call: how long it took, and the bytes of weights that it read."""

    seconds: float
    nbytes: int


@dataclass(frozen=True)
class Runs:
    """Runs of one kind. They may differ a little in their bytes, so rates are those of single runs."""

    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        """The median."""
        return median(run.seconds for run in self.runs)

    @property
    def seconds_quartiles(self) -> tuple[float, float]:
        """A quarter of the runs took less than the first, a quarter more than the second."""
        return _quartiles([run.seconds for run in self.runs])

    @property
    def nbytes(self) -> int:
        """The bytes of a typical run."""
        return median_low(run.nbytes for run in self.runs)

    @property
    def bytes_s(self) -> float:
        """The median rate."""
        return median(run.nbytes / run.seconds for run in self.runs)

    @property
    def bytes_s_quartiles(self) -> tuple[float, float]:
        return _quartiles([run.nbytes / run.seconds for run in self.runs])


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def alternate(*kinds: Callable[[], Run], effort: Effort) -> tuple[Runs, ...]:
    """Run one of each kind, again one of each ... The first round does not count."""
    _round(kinds)
    begin = time.perf_counter()
    rounds: list[tuple[Run, ...]] = []
    while len(rounds) < effort.least or (len(rounds) < effort.most and time.perf_counter() - begin < effort.seconds):
        rounds.append(_round(kinds))
    return tuple(Runs(runs) for runs in zip(*rounds, strict=True))


def _round(kinds: Sequence[Callable[[], Run]]) -> tuple[Run, ...]:
    return tuple(run() for run in kinds)


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin

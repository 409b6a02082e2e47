"""Rounds of workers' runs, and how much of the machine others took meanwhile."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import psutil

from benchmarks.workers import Worker
from offload.benchmark.measure import Effort, Run, Runs, alternate


@dataclass(frozen=True)
class Measured:
    """Rounds of one run of each kind. foreign: cores that others, hypervisor included, kept busy meanwhile."""

    runs: Mapping[str, Runs]
    foreign: float

    @property
    def ratios(self) -> tuple[float, float, float]:
        """How many times as long as "ours" "peer" took, round by round: lower quartile, median, upper quartile."""
        pairs = zip(self.runs["peer"].runs, self.runs["ours"].runs, strict=True)
        low, middle, high = quantiles([peer.seconds / ours.seconds for peer, ours in pairs], n=4, method="inclusive")
        return low, middle, high

    def to_json(self) -> dict[str, Any]:
        """Median and quartiles of each kind in milliseconds, and what else is known of the rounds."""
        return {
            "rounds": min(len(runs.runs) for runs in self.runs.values()),
            "foreign_cores": self.foreign,
            **{
                f"{kind}_ms": [1e3 * seconds for seconds in (runs.seconds, *runs.seconds_quartiles)]
                for kind, runs in self.runs.items()
            },
        }


def measure(kinds: Mapping[str, Callable[[], Run]], workers: Sequence[Worker], effort: Effort) -> Measured:
    """Run all kinds in turn, while `workers` do the work."""
    begin, busy, own = time.perf_counter(), _busy_seconds(), _own_seconds(workers)
    runs = alternate(*kinds.values(), effort=effort)
    elapsed = time.perf_counter() - begin
    foreign = (_busy_seconds() - busy - (_own_seconds(workers) - own)) / elapsed
    return Measured(dict(zip(kinds, runs, strict=True)), max(0.0, foreign))


def _busy_seconds() -> float:
    """Processor time of all cores together that was not idle, stolen time included."""
    times = psutil.cpu_times()
    counted = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(float(getattr(times, name, 0.0)) for name in counted)


def _own_seconds(workers: Sequence[Worker]) -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system) + sum(worker.cpu_seconds() for worker in workers)

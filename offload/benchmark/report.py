"""All figures of one shape: the layer at several numbers of tokens, beside the machine's limits."""

from dataclasses import dataclass
from typing import Any

from offload.benchmark.layer import BenchLayers, Tell
from offload.benchmark.limits import expert_ranges, fastest_read, peak_operations, record_ranges, timed_read
from offload.benchmark.measure import Effort, Run, Runs, alternate, seconds_of
from quant import isa
from quant.kernels import set_threads, thread_count
from quant.kernels.bandwidth import ReadVariant


@dataclass(frozen=True)
class Wanted:
    """What to measure: numbers of tokens, and how long each of them."""

    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    effort: Effort = Effort()

    @property
    def max_tokens(self) -> int:
        return max((*self.decode, *self.prefill, 1))


@dataclass(frozen=True)
class Limits:
    """The machine with all threads that are set. read: of all weights. peak: operations on bytes a second."""

    variant: ReadVariant
    read: Runs
    peak: float


@dataclass(frozen=True)
class Point:
    """The layer at one number of tokens, and plain reads of as many experts, which took turns with it.

    experts: different ones that a typical call touches. operations: additions and multiplications of a call. peak: the
    machine's operations a second.
    """

    tokens: int
    threads: int
    experts: int
    operations: int
    peak: float
    layer: Runs
    read: Runs

    @property
    def read_share(self) -> float:
        """Of the read bandwidth."""
        return self.layer.bytes_s / self.read.bytes_s

    @property
    def operations_s(self) -> float:
        return self.operations / self.layer.seconds

    @property
    def peak_share(self) -> float:
        """Of the machine's peak in multiplying bytes."""
        return self.operations_s / self.peak

    def to_json(self, share: float) -> dict[str, Any]:
        """share: the one of the two by which calls of this kind are judged."""
        return {
            "tokens": self.tokens,
            "threads": self.threads,
            "runs": len(self.layer.runs),
            "ms": 1e3 * self.layer.seconds,
            "ms_quartiles": [1e3 * seconds for seconds in self.layer.seconds_quartiles],
            "experts": self.experts,
            "bytes": self.layer.nbytes,
            "gb_s": self.layer.bytes_s / 1e9,
            "read_gb_s": self.read.bytes_s / 1e9,
            "read_gb_s_quartiles": [rate / 1e9 for rate in self.read.bytes_s_quartiles],
            "read_share": self.read_share,
            "gflop_s": self.operations_s / 1e9,
            "peak_share": self.peak_share,
            "share": share,
        }


@dataclass(frozen=True)
class Report:
    """Everything measured for a shape. scaling: one token with fewer threads."""

    shape: str
    format: str
    threads: int
    layers: int
    experts: int
    weight_bytes: int
    limits: Limits
    decode: tuple[Point, ...]
    prefill: tuple[Point, ...]
    scaling: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """`share` is of the read bandwidth in decode and scaling, of the peak in prefill."""
        return {
            "shape": self.shape,
            "format": self.format,
            "isa": isa.current(),
            "threads": self.threads,
            "layers": self.layers,
            "experts": self.experts,
            "weight_bytes": self.weight_bytes,
            "read_gb_s": self.limits.read.bytes_s / 1e9,
            "read_streams": self.limits.variant.streams,
            "read_prefetch_bytes": self.limits.variant.ahead,
            "peak_gop_s": self.limits.peak / 1e9,
            "decode": [point.to_json(point.read_share) for point in self.decode],
            "prefill": [point.to_json(point.peak_share) for point in self.prefill],
            "scaling": [point.to_json(point.read_share) for point in self.scaling],
        }


def measure_shape(name: str, layers: BenchLayers, wanted: Wanted, tell: Tell) -> Report:
    """Measure with as many threads as are set."""
    limits = measure_limits(layers, tell)
    decode, prefill = (
        tuple(measure_point(layers, tokens, limits, wanted.effort, tell) for tokens in sizes)
        for sizes in (wanted.decode, wanted.prefill)
    )
    return Report(
        shape=name,
        format=layers.record.format.name,
        threads=thread_count(),
        layers=layers.extent.layers,
        experts=layers.extent.experts,
        weight_bytes=layers.weight_bytes,
        limits=limits,
        decode=decode,
        prefill=prefill,
        scaling=measure_scaling(layers, limits, wanted.effort, tell) if wanted.decode else (),
    )


def measure_limits(layers: BenchLayers, tell: Tell) -> Limits:
    """Read all weights, and multiply bytes."""
    tell("measuring the memory's read bandwidth and the peak (kernels are compiled at their first use)")
    variant, read = fastest_read(expert_ranges(layers.layers, layers.weight_bytes))
    return Limits(variant, read, peak_operations())


def measure_point(layers: BenchLayers, tokens: int, limits: Limits, effort: Effort, tell: Tell) -> Point:
    """Calls of `tokens` tokens, in turns with plain reads of the experts that the next call would touch."""
    tell(f"measuring {plural(tokens, 'token')} with {plural(thread_count(), 'thread')}")

    def run_layer() -> Run:
        turn = layers.turn(tokens)
        return Run(seconds_of(lambda: layers.run(turn)), len(turn.chosen) * layers.record.nbytes)

    def run_read() -> Run:
        turn = layers.turn(tokens)
        return timed_read(record_ranges(turn.packed, turn.chosen), limits.variant)

    layer, read = alternate(run_layer, run_read, effort=effort)
    experts = layer.nbytes // layers.record.nbytes
    return Point(tokens, thread_count(), experts, layers.operations(tokens), limits.peak, layer, read)


def measure_scaling(layers: BenchLayers, limits: Limits, effort: Effort, tell: Tell) -> tuple[Point, ...]:
    """One token with 1, 2, 4 ... threads, up to those that are set; nothing for one thread."""
    threads, points = thread_count(), []
    try:
        for count in thread_steps(threads):
            set_threads(count)
            at_count = Limits(limits.variant, limits.read, peak_operations())
            points.append(measure_point(layers, 1, at_count, effort, tell))
    finally:
        set_threads(threads)
    return tuple(points)


def plural(count: int, noun: str) -> str:
    """1 token, 2 tokens."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def thread_steps(threads: int) -> list[int]:
    """Powers of two up to `threads`, and `threads`; nothing for one thread."""
    powers = [1 << bit for bit in range(threads.bit_length()) if 1 << bit < threads]
    return [*powers, threads] if threads > 1 else []

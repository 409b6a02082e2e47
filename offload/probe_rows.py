"""Rows of calls of the kernels for weights, for offload/probe.py: experts of a format, and their matrices alone.

The same blocks serve for experts and matrices of other shapes, as each tells its own scales: that shows what a result
costs beside the blocks that it is made from.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from offload.backend import CpuBackend
from offload.benchmark.measure import seconds_of
from offload.experts import CpuExperts, ExpertBuffers, PackedExperts
from offload.machine import Points
from quant.kernels.threads import thread_count
from quant.packed import BLOCK_K, TILE_ROWS, ExpertRecord, PackedFormat
from quant.shapes import known_shape
from quant.tape import PASSES, Repeated

DIM, INTER, TOP_K = 6144, 1536, 4  # of the experts that are measured: no model's
TOUCHED = 16  # experts of a call
EXPERT_TOKENS = (1, 4, 5, 16, 64, 192)  # of an expert
MATRIX_TOKENS = (1, 4, 16, 128, 512)
WIDER = 6  # times as many rows of a sixth of the columns, where results are measured,
MANY = 128  # tokens of a matrix and of an expert there
SLICES = 6  # of a matrix, where many small ones are measured
PLAIN_ROWS = 256  # of a matrix of float32
RUNS = 3
LEAST_S = 1e-9  # where noise hides a difference
BLOCK = TILE_ROWS * BLOCK_K
Typical = Callable[[Sequence[float]], float]


def played(*works: Callable[[], Tensor], typical: Typical = median) -> list[float]:
    """Seconds of rows of kernels as decoding plays them (quant/tape.py); rows take turns.

    typical: min where two rows are compared that differ by little.
    """
    rows = [(Repeated(), work) for work in works]
    rounds = [[_play(row, work, position) for row, work in rows] for position in range(PASSES + RUNS)]
    return [typical(runs) for runs in zip(*rounds[PASSES:], strict=True)]


def _play(row: Repeated, work: Callable[[], Tensor], position: int) -> float:
    return seconds_of(lambda: row.run(position, work))


def called(*rows: Callable[[], object], typical: Typical = median) -> list[float]:
    """Seconds of rows of operators, which take turns; the first round does not count."""
    rounds = [[seconds_of(row) for row in rows] for _ in range(1 + RUNS)]
    return [typical(runs) for runs in zip(*rounds[1:], strict=True)]


def core_ns(seconds: float, blocks: float) -> float:
    """Time of one core for a block, of a row that all cores share."""
    return 1e9 * seconds * thread_count() / blocks


def few(tokens: int) -> int:
    """Calls of a row: fewer where each takes longer."""
    return 3 if tokens < MANY else 1


class ProbeExperts:
    """Calls of a layer that go through `records`, a whole number of times TOUCHED."""

    def __init__(self, records: Tensor, record: ExpertRecord, top_k: int = TOP_K) -> None:
        self.records, self.record, self.top_k = records, record, top_k
        shape = known_shape("moonshotai/Moonlight-16B-A3B")
        assert shape is not None
        config = replace(shape.config, dim=record.dim, moe_inter_dim=record.inter_dim)
        config = replace(config, n_routed_experts=len(records), n_activated_experts=top_k)
        backend = CpuBackend()
        buffers = ExpertBuffers(config, backend, TOUCHED * max(*EXPERT_TOKENS, MANY) // top_k)
        self.layer = CpuExperts(PackedExperts(records, record), backend, buffers)
        self.first = 0  # expert of the next call

    @property
    def outputs(self) -> int:
        """Results for a token: gates, values beside them, and the sum."""
        return 2 * self.record.inter_dim + self.record.dim

    def whole(self, touched: int) -> Callable[[], Tensor]:
        """Calls of one token an expert that touch all experts, `touched` at a time."""
        tokens = touched // self.top_k
        asked = torch.arange(len(self.records)).view(-1, tokens, self.top_k)
        x, weights = torch.randn(tokens, self.record.dim), torch.rand(tokens, self.top_k)

        def work() -> Tensor:
            for ids in asked:
                out = self.layer.sync(self.layer.submit(x, ids, weights))
            return out

        return work

    def row(self, each: int) -> Callable[[], None]:
        """few(each) calls with `each` tokens an expert, each time of the experts that were not used for longest."""
        tokens = TOUCHED * each // self.top_k
        asked = torch.arange(tokens * self.top_k) % TOUCHED
        x, weights = torch.randn(tokens, self.record.dim), torch.rand(tokens, self.top_k)

        def row() -> None:
            for _ in range(few(each)):
                ids = (asked + self.first).view(tokens, self.top_k)
                self.first = (self.first + TOUCHED) % len(self.records)
                self.layer.sync(self.layer.submit(x, ids, weights))

        return row


def expert_points(records: Tensor, record: ExpertRecord) -> tuple[Points, float]:
    """(tokens of an expert, ns of a core for a block) without results, and the ns of a core for a result."""
    layer = ProbeExperts(records, record)
    wider = ProbeExperts(records, ExpertRecord(record.format, DIM // WIDER, INTER * WIDER))
    blocks = TOUCHED * 3 * DIM * INTER / BLOCK
    more = TOUCHED * MANY * (wider.outputs - layer.outputs)
    wide_s, near_s = called(wider.row(MANY), layer.row(MANY), typical=min)
    output_ns = core_ns(max(LEAST_S, wide_s - near_s), few(MANY) * more)
    [seconds] = played(layer.whole(TOUCHED))
    found = [(1, core_ns(seconds, len(records) / TOUCHED * blocks))]
    times = called(*map(layer.row, EXPERT_TOKENS[1:]))
    found += [(each, core_ns(row_s, few(each) * blocks)) for each, row_s in zip(EXPERT_TOKENS[1:], times, strict=True)]
    return _without(found, output_ns * TOUCHED * layer.outputs / blocks), output_ns


def experts_beginning_s(records: Tensor, record: ExpertRecord) -> float:
    """What a layer takes beside its blocks: all experts one by one, beside calls of TOUCHED."""
    layer = ProbeExperts(records, record, top_k=1)
    small, large = played(layer.whole(1), layer.whole(TOUCHED), typical=min)
    return max(LEAST_S, small - large) / (len(records) - len(records) / TOUCHED)


class ProbeMatrices:
    """Matrices [rows, columns] in a format, one by one."""

    def __init__(self, matrices: Sequence[Tensor], fmt: PackedFormat, shape: tuple[int, int]) -> None:
        self.matrices, self.format, self.shape = matrices, fmt, shape
        self.next = 0

    def row(self, tokens: int) -> Callable[[], None]:
        """3 few(tokens) matrices with so many tokens, those that were not used for longest."""
        x = torch.randn(tokens, self.shape[1])

        def row() -> None:
            for _ in range(3 * few(tokens)):
                self._multiply(x, self.matrices[self.next], self.shape[0])
                self.next = (self.next + 1) % len(self.matrices)

        return row

    def whole(self, slices: int) -> Callable[[], Tensor]:
        """All matrices with one token, each in so many slices."""
        rows, columns = self.shape
        x = torch.randn(1, columns)
        parts = [part for matrix in self.matrices for part in matrix.chunk(slices)]

        def work() -> Tensor:
            for part in parts:
                out = self._multiply(x, part, rows // slices)
            return out

        return work

    def _multiply(self, x: Tensor, matrix: Tensor, rows: int) -> Tensor:
        out: Tensor = torch.ops.dsr1.packed_linear.default(x, matrix, self.format.name, rows, self.shape[1])
        return out


def matrices_of(records: Tensor, record: ExpertRecord) -> list[Tensor]:
    """The matrices of experts, each of as many blocks as w1."""
    size = record.w3
    return [one[at : at + size] for one in records for at in range(0, 3 * size, size)]


def matrix_points(records: Tensor, record: ExpertRecord) -> tuple[Points, float]:
    """(tokens, ns of a core for a block) without results, and the ns of a core for a result."""
    matrices, blocks = matrices_of(records, record), INTER * DIM / BLOCK
    single = ProbeMatrices(matrices, record.format, (INTER, DIM))
    wider = ProbeMatrices(matrices, record.format, (INTER * WIDER, DIM // WIDER))
    more = MANY * (wider.shape[0] - INTER)
    wide_s, near_s = called(wider.row(MANY), single.row(MANY), typical=min)
    output_ns = core_ns(max(LEAST_S, wide_s - near_s), 3 * few(MANY) * more)
    [seconds] = played(single.whole(1))
    found = [(1, core_ns(seconds, len(matrices) * blocks))]
    times = called(*map(single.row, MATRIX_TOKENS[1:]))
    found += [(each, core_ns(s, 3 * few(each) * blocks)) for each, s in zip(MATRIX_TOKENS[1:], times, strict=True)]
    return _without(found, output_ns * INTER / blocks), output_ns


def beginnings(records: Tensor, record: ExpertRecord) -> tuple[float, float]:
    """What a matrix takes beside its blocks: all in slices, beside whole ones. What operators take beside kernels."""
    single = ProbeMatrices(matrices_of(records, record), record.format, (INTER, DIM))
    count = len(single.matrices)
    small, large = played(single.whole(SLICES), single.whole(1), typical=min)
    [operators] = called(single.whole(SLICES), typical=min)
    return max(LEAST_S, small - large) / ((SLICES - 1) * count), max(LEAST_S, operators - small) / (SLICES * count)


def _without(points: Sequence[tuple[float, float]], outputs_ns: float) -> Points:
    """Points without what the results of each token take, in a block's share."""
    return tuple((tokens, max(ns / 4, ns - tokens * outputs_ns)) for tokens, ns in points)


def plain_points(memory: Tensor) -> Points:
    """(tokens, ns of a core for a block) of matrices of float32. memory: is overwritten."""
    count = max(1, memory.nbytes // (4 * PLAIN_ROWS * DIM) // 4)
    floats = memory.view(torch.float32) if memory.nbytes >= 4 * PLAIN_ROWS * DIM else torch.empty(PLAIN_ROWS * DIM)
    matrices = floats[: count * PLAIN_ROWS * DIM].fill_(0.5).view(count, PLAIN_ROWS, DIM)
    blocks = PLAIN_ROWS * DIM / BLOCK

    def row(tokens: int, number: int) -> Callable[[], Tensor]:
        x = torch.randn(tokens, DIM)

        def work() -> Tensor:
            for matrix in matrices[:number]:
                out: Tensor = torch.ops.dsr1.linear.default(x, matrix, None)
            return out

        return work

    [seconds] = played(row(1, count))
    found = [(1, core_ns(seconds, count * blocks))]
    times = called(*(row(tokens, 1) for tokens in MATRIX_TOKENS[2:]))
    found += [(tokens, core_ns(s, blocks)) for tokens, s in zip(MATRIX_TOKENS[2:], times, strict=True)]
    return tuple(found)

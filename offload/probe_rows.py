"""Rows of calls of the kernels for weights, for offload/probe.py: experts of a format, and their matrices alone."""

from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from offload.backend import CpuBackend
from offload.benchmark.measure import seconds_of
from offload.benchmark.weights import fill_records
from offload.experts import CpuExperts, ExpertBuffers, PackedExperts
from offload.machine import Points
from offload.memory import huge_memory
from quant.kernels.threads import thread_count
from quant.packed import BLOCK_K, TILE_ROWS, ExpertRecord, PackedFormat
from quant.shapes import known_shape
from quant.tape import PASSES, Repeated

DIM, INTER, TOP_K = 6144, 1536, 4  # of the experts that are measured: no model's
TOUCHED = 16  # experts of a call
EXPERT_TOKENS = (1, 2, 4, 5, 16, 64, 192)  # of an expert
MATRIX_TOKENS = (1, 4, 16, 128, 512)
CALLS = 3  # of a row for more than one token
SLICES = 6  # of a matrix, where many small ones are measured
PLAIN_ROWS = 256  # of a matrix of float32
RUNS = 3
LEAST_S = 1e-9  # where noise hides a difference
BLOCK = TILE_ROWS * BLOCK_K


def played(work: Callable[[], Tensor]) -> float:
    """Seconds of a row of kernels as decoding plays it (quant/tape.py)."""
    repeated = Repeated()
    runs = [seconds_of(lambda position=position: repeated.run(position, work)) for position in range(PASSES + RUNS)]  # type: ignore[misc]
    return median(runs[PASSES:])


def called(row: Callable[[], object]) -> float:
    """Seconds of a row of operators; the first run does not count."""
    return median([seconds_of(row) for _ in range(1 + RUNS)][1:])


def core_ns(seconds: float, blocks: float) -> float:
    """Time of one core for a block, of a row that all cores share."""
    return 1e9 * seconds * thread_count() / blocks


class ProbeExperts:
    """As many random experts as `memory` holds, at least TOUCHED, and calls that go through them."""

    def __init__(self, fmt: PackedFormat, memory: Tensor) -> None:
        self.record = record = ExpertRecord(fmt, DIM, INTER)
        count = max(TOUCHED, memory.nbytes // record.nbytes) // TOUCHED * TOUCHED
        room = memory if memory.nbytes >= count * record.nbytes else huge_memory(count * record.nbytes)
        self.records = room[: count * record.nbytes].view(count, record.nbytes)
        fill_records(record, self.records, 0)
        shape = known_shape("moonshotai/Moonlight-16B-A3B")
        assert shape is not None
        config = replace(shape.config, dim=DIM, moe_inter_dim=INTER, n_routed_experts=count, n_activated_experts=TOP_K)
        backend = CpuBackend()
        buffers = ExpertBuffers(config, backend, TOUCHED * EXPERT_TOKENS[-1] // TOP_K)
        self.layer = CpuExperts(PackedExperts(self.records, record), backend, buffers)
        self.first = 0  # expert of the next call

    def points(self) -> Points:
        """(tokens of an expert, ns of a core for a block)."""
        blocks = TOUCHED * 3 * DIM * INTER / BLOCK
        found = [(1, core_ns(played(self._whole(TOUCHED)), len(self.records) / TOUCHED * blocks))]
        for tokens in EXPERT_TOKENS[1:]:
            found.append((tokens, core_ns(called(self._row(tokens)), CALLS * blocks)))
        return tuple(found)

    def beginning_s(self) -> float:
        """What a layer takes beside its blocks: all experts in calls of TOP_K, beside calls of TOUCHED."""
        more = len(self.records) / TOP_K - len(self.records) / TOUCHED
        return max(LEAST_S, played(self._whole(TOP_K)) - played(self._whole(TOUCHED))) / more

    def _whole(self, touched: int) -> Callable[[], Tensor]:
        """Calls of one token an expert that touch all experts, `touched` at a time."""
        tokens = touched // TOP_K
        asked = torch.arange(len(self.records)).view(-1, tokens, TOP_K)
        x, weights = torch.randn(tokens, DIM), torch.rand(tokens, TOP_K)

        def work() -> Tensor:
            for ids in asked:
                out = self.layer.sync(self.layer.submit(x, ids, weights))
            return out

        return work

    def _row(self, each: int) -> Callable[[], None]:
        """CALLS calls with `each` tokens an expert, each time of the experts that were not used for longest."""
        tokens = TOUCHED * each // TOP_K
        asked = torch.arange(tokens * TOP_K) % TOUCHED
        x, weights = torch.randn(tokens, DIM), torch.rand(tokens, TOP_K)

        def row() -> None:
            for _ in range(CALLS):
                ids = (asked + self.first).view(tokens, TOP_K)
                self.first = (self.first + TOUCHED) % len(self.records)
                self.layer.sync(self.layer.submit(x, ids, weights))

        return row


class ProbeMatrices:
    """The matrices of the experts, all taken as [INTER, DIM], one by one."""

    def __init__(self, experts: ProbeExperts) -> None:
        record = experts.record
        self.format, size = record.format, record.w3
        self.matrices = [one[at : at + size] for one in experts.records for at in range(0, 3 * size, size)]
        self.next = 0

    def points(self) -> Points:
        """(tokens, ns of a core for a block)."""
        blocks = INTER * DIM / BLOCK
        found = [(1, core_ns(played(self._whole(1)), len(self.matrices) * blocks))]
        for tokens in MATRIX_TOKENS[1:]:
            found.append((tokens, core_ns(called(self._row(tokens)), 3 * CALLS * blocks)))
        return tuple(found)

    def beginning_s(self) -> float:
        """What a matrix takes beside its blocks: all matrices in slices, beside whole ones."""
        more = (SLICES - 1) * len(self.matrices)
        return max(LEAST_S, played(self._whole(SLICES)) - played(self._whole(1))) / more

    def eager_s(self) -> float:
        """What an operator takes beside its kernels."""
        work = self._whole(SLICES)
        return max(LEAST_S, called(work) - played(work)) / (SLICES * len(self.matrices))

    def heads(self, shape: tuple[int, int, int]) -> list[Tensor]:
        """Some of each matrix as a packed wkv_b of `shape`: heads, rows of a head, columns."""
        heads, rows, columns = shape
        blocks = heads * rows * columns // BLOCK
        parts = [matrix.view(-1, self.format.block_bytes)[:blocks] for matrix in self.matrices]
        return [part.reshape(heads, rows // TILE_ROWS, columns // BLOCK_K, -1) for part in parts]

    def _whole(self, slices: int) -> Callable[[], Tensor]:
        """All matrices with one token, each in so many slices."""
        x = torch.randn(1, DIM)
        parts = [part for matrix in self.matrices for part in matrix.chunk(slices)]

        def work() -> Tensor:
            for part in parts:
                out = self._multiply(x, part, INTER // slices)
            return out

        return work

    def _row(self, tokens: int) -> Callable[[], None]:
        x = torch.randn(tokens, DIM)

        def row() -> None:
            for _ in range(3 * CALLS):
                self._multiply(x, self.matrices[self.next], INTER)
                self.next = (self.next + 1) % len(self.matrices)

        return row

    def _multiply(self, x: Tensor, matrix: Tensor, rows: int) -> Tensor:
        out: Tensor = torch.ops.dsr1.packed_linear.default(x, matrix, self.format.name, rows, DIM)
        return out


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

    found = [(1, core_ns(played(row(1, count)), count * blocks))]
    for tokens in MATRIX_TOKENS[2:]:
        number = min(count, CALLS)
        found.append((tokens, core_ns(called(row(tokens, number)), number * blocks)))
    return tuple(found)

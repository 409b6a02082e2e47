"""What this machine can do at most, measured: reading the weights' own memory, and multiplying bytes."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from offload.benchmark.measure import Run, Runs, seconds_of
from offload.experts import CpuExperts, PackedExperts
from offload.node_experts import NodeExperts
from quant.isa import has_tiles
from quant.kernels.bandwidth import (
    OPERAND_BYTES,
    PAGE,
    READ_VARIANTS,
    ROUND_OPERATIONS,
    ReadVariant,
    multiply_bytes,
    multiply_tiles,
    read_ranges,
)
from quant.kernels.threads import thread_count
from quant.kernels.tile_instructions import PEAK_BYTES, PEAK_OPERATIONS

READ_RUNS = 3  # of each variant
PEAK_RUNS = 5
TILE_ROUNDS = 1 << 19
PEAK_ROUNDS = 1 << 21  # some milliseconds with vectors of 512 bits


def record_ranges(experts: PackedExperts, chosen: Iterable[int]) -> Tensor:
    """The memory of some experts' records, for read_ranges: int64 [R, 2]."""
    base, nbytes = experts.records.data_ptr(), experts.record.nbytes
    return torch.tensor([(base + expert * nbytes, nbytes // PAGE) for expert in chosen], dtype=torch.int64)


def expert_ranges(layers: Sequence[CpuExperts], limit: int) -> Tensor:
    """The memory of all experts of `layers`, for read_ranges, of as many layers as hold `limit` bytes."""
    ranges: list[tuple[int, int]] = []
    for layer in layers:
        if sum(pages for _, pages in ranges) * PAGE >= limit:
            break
        if isinstance(layer.weights, PackedExperts):
            tensors: Iterable[Tensor] = layer.weights.records
        elif isinstance(layer.weights, NodeExperts):
            tensors = [expert for part in layer.weights.parts for expert in part]
        else:
            tensors = [weight.data for expert in layer.weights for weight in expert]
        ranges += [(tensor.data_ptr(), tensor.nbytes // PAGE) for tensor in tensors]
    return torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2)


def range_bytes(ranges: Tensor) -> int:
    """Bytes that read_ranges reads."""
    return int(ranges[:, 1].sum()) * PAGE


def timed_read(ranges: Tensor, variant: ReadVariant) -> Run:
    """Read `ranges` once."""
    return Run(seconds_of(lambda: read_ranges(ranges, variant)), range_bytes(ranges))


def fastest_read(ranges: Tensor) -> tuple[ReadVariant, Runs]:
    """The fastest way of reading `ranges`, and its runs. Ways take turns."""
    timed_read(ranges[:1], READ_VARIANTS[0])  # compiles
    rounds = [[timed_read(ranges, variant) for variant in READ_VARIANTS] for _ in range(READ_RUNS)]
    runs = [Runs(tuple(of_variant)) for of_variant in zip(*rounds, strict=True)]
    best = max(READ_VARIANTS, key=lambda variant: runs[variant.code].bytes_s)
    return best, runs[best.code]


def peak_operations() -> float:
    """Additions and multiplications of bytes a second, all threads together, with operands at hand: the best run.

    With the instructions that the packed kernels use for many tokens: AMX, or what multiplies vectors of bytes.
    """
    if has_tiles():
        tiles = torch.ones(thread_count(), PEAK_BYTES, dtype=torch.uint8)
        multiply_tiles(tiles, 1)  # compiles
        best = min(seconds_of(lambda: multiply_tiles(tiles, TILE_ROUNDS)) for _ in range(PEAK_RUNS))
        return thread_count() * TILE_ROUNDS * PEAK_OPERATIONS / best
    operands = torch.arange(OPERAND_BYTES).to(torch.uint8)
    multiply_bytes(operands, 1)  # compiles
    best = min(seconds_of(lambda: multiply_bytes(operands, PEAK_ROUNDS)) for _ in range(PEAK_RUNS))
    return thread_count() * PEAK_ROUNDS * ROUND_OPERATIONS / best

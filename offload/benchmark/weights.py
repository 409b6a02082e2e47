"""Random experts that multiply like real ones: any codes, and scales that keep activations near 1."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.memory import huge_memory
from quant.packed import HIGHEST_INTEGER, INTEGER_STEP, LINE, LOWEST_INTEGER, TILE_ROWS, ExpertRecord, PackedFormat
from quant.packing import bf16_of_float, levels_of


def random_records(record: ExpertRecord, count: int, seed: int) -> Tensor:
    """uint8 [count, record.nbytes] in memory of their own: fill_records."""
    records = huge_memory(count * record.nbytes).view(count, record.nbytes)
    fill_records(record, records, seed)
    return records


def fill_records(record: ExpertRecord, records: Tensor, seed: int) -> None:
    """Write one random expert into each of `records`, uint8 [count, record.nbytes], with its blocks moved on by some.

    Drawing every expert anew would take long.
    """
    rng = np.random.default_rng(seed)
    blocks = torch.from_numpy(random_blocks(record, rng))
    for row in records:
        first = int(rng.integers(len(blocks)))
        used = row[: blocks.numel()].view(blocks.shape)
        used[: len(blocks) - first] = blocks[first:]
        used[len(blocks) - first :] = blocks[:first]


def random_blocks(record: ExpertRecord, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The blocks of w1, w3 and w2 of an expert: uint8 [blocks, block_bytes]."""
    fmt, shape = record.format, (record.inter_dim, record.dim)
    count = (2 * fmt.nbytes(shape) + fmt.nbytes(shape[::-1])) // fmt.block_bytes
    blocks = np.frombuffer(rng.bytes(count * fmt.block_bytes), np.uint8).reshape(count, fmt.block_bytes).copy()
    d = rng.uniform(0.5, 1.5, (count, TILE_ROWS)) / (np.sqrt(record.dim) * typical_weight(fmt))
    words = blocks[:, :LINE].view("<u4")
    integers = 0 if fmt.integers is None else words & 0xFFFF
    words[:] = integers | bf16_of_float(d.astype(np.float32)).astype(np.uint32) << 16
    return blocks


def typical_weight(fmt: PackedFormat) -> float:
    """Root mean square of what d is multiplied by, over all codes and integers."""
    levels = levels_of(np.arange(2**fmt.bits, dtype=np.uint8), fmt).astype(np.float64)
    integers = np.ones(1)
    if (kind := fmt.integers) is not None:
        integers = np.array(range(LOWEST_INTEGER[kind], HIGHEST_INTEGER[kind] + 1, INTEGER_STEP[kind]), np.float64)
    return float(np.sqrt(np.mean(levels**2) * np.mean(integers**2)))

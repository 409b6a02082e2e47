"""How much longer kernels wait for weights where a model holds them than in the probe's own memory.

The probe (offload/probe.py) has its weights in huge pages. A mapped file lies in the page cache, in pages that may be
small and scattered, which costs up to a third of a kernel's speed; nothing but its own pages tells how much. So the
kernel for matrices runs here on the model's memory, in shapes of the probe's: blocks of weights tell their own scales,
so any of them serve. It is no run of the model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.benchmark.weights import random_records
from offload.experts import CpuExperts, PackedExperts
from offload.probe_rows import BLOCK, ProbeMatrices, core_ns, played
from quant.packed import TILE_ROWS, ExpertRecord

BYTES = 3 * 2**29  # of experts, in either memory: several times the largest caches
COLUMNS = 1024  # of the matrices that gate and up of an expert are taken as


def waiting_ns(layers: Sequence[CpuExperts]) -> float:
    """How much longer a core waits for a byte of the layers' experts; less than 0 if shorter.

    0 where experts are not packed, or too small. Takes 1.5 GiB of RAM for comparison, less where there are fewer.
    """
    packed = [layer.weights for layer in layers if isinstance(layer.weights, PackedExperts)]
    if not packed:
        return 0.0
    record = ExpertRecord(packed[0].record.format, packed[0].record.dim, packed[0].record.inter_dim)
    stored = [one for experts in packed if experts.record.format == record.format for one in experts.records]
    count = min(len(stored), max(1, BYTES // record.nbytes))
    rows = 2 * record.w3 // record.format.block_bytes * BLOCK // COLUMNS // TILE_ROWS * TILE_ROWS
    if not rows:
        return 0.0
    own = random_records(record, count, 0)
    there = _matrices(stored[:: len(stored) // count][:count], record, rows)
    with torch.inference_mode():
        slow, fast = played(there.whole(1), _matrices(own, record, rows).whole(1))
    return core_ns(slow - fast, count * rows * COLUMNS / BLOCK) / record.format.block_bytes


def _matrices(experts: Sequence[Tensor] | Tensor, record: ExpertRecord, rows: int) -> ProbeMatrices:
    """Gate and up of each expert as one matrix [rows, COLUMNS]."""
    nbytes = record.format.nbytes((rows, COLUMNS))
    return ProbeMatrices([one[:nbytes] for one in experts], record.format, (rows, COLUMNS))

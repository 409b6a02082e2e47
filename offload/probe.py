"""What the cost model needs to know of this machine, measured in some fifteen seconds: offload/machine.py.

Nothing is a run of a model. Kernels run on random weights, in shapes of no model, from more memory than caches hold:

    reading          plain reads of gigabytes, as in `dsr1 bench`
    a block's time   layers of experts, and single matrices, of a format, at 1 to some hundred tokens (probe_rows.py)
    beginnings       the same bytes in many calls and in few; the same calls played and as operators
    steps            small kernels as decoding plays them; conversions of many values
    attention        both forms, on random queries and latents

A figure is of a row of calls, as a token or a prompt is one: the system's interruptions count in it as they do there.
"""

import platform
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import psutil
import torch
from torch import Tensor

from offload.benchmark.limits import fastest_read
from offload.benchmark.weights import fill_records
from offload.gpu_probe import measure_gpu
from offload.machine import Machine, Points
from offload.memory import huge_memory
from offload.probe_rows import (
    BLOCK,
    DIM,
    INTER,
    TOUCHED,
    beginnings,
    called,
    core_ns,
    expert_points,
    experts_beginning_s,
    matrices_of,
    matrix_points,
    plain_points,
    played,
)
from offload.this_machine import known_gpu
from offload.topology import read_topology
from quant import isa, model_ops
from quant.conversion import converted
from quant.kernels.bandwidth import PAGE
from quant.kernels.threads import thread_count
from quant.packed import ACCURATE, BLOCK_K, FAST, Q8, TILE_ROWS, ExpertRecord

FORMATS = (ACCURATE, Q8, FAST)  # of the last one beginnings are measured, and wkv_b
READ_BYTES = 3 * 2**29  # several times the largest caches
STEPS, WIDTH = 256, 2048  # small steps in a row; values of a token
TENSORS, MANY_ROWS = 32, 512  # of many tokens
HEADS, NOPE, ROPE, LORA, VALUE = 16, 128, 64, 512, 128  # of attention
NEAR, SEEN, FAR = 16, 1024, 4096  # tokens of a context
Tell = Callable[[str], None]


def probe(tell: Tell) -> Machine:
    """Measure with as many threads as are set; takes up to 2 GiB of RAM, less where less is there.

    Kernels should be compiled before (quant/kernels/ahead.py).
    """
    tell("measuring this machine's memory")
    memory = huge_memory(min(READ_BYTES, psutil.virtual_memory().available // 4) // PAGE * PAGE).fill_(1)
    _, read = fastest_read(torch.tensor([[memory.data_ptr(), memory.nbytes // PAGE]]))
    tell("measuring this machine's kernels")
    with torch.inference_mode():
        measured = {**_weights(memory), **_steps()}
    return Machine(
        name=platform.node() or "this machine",
        source="measured",
        date=date.today().isoformat(),
        cores=thread_count(),
        isa=isa.current(),
        nodes=len(read_topology().nodes),
        ram=psutil.virtual_memory().total,
        read_bytes_s=read.bytes_s,
        gpu=measure_gpu(known_gpu()),
        **measured,
    )


def _weights(memory: Tensor) -> dict[str, Any]:
    """The fields of Machine about weights and attention."""
    experts: dict[str, Points] = {}
    matrices: dict[str, Points] = {"f32": plain_points(memory)}
    for fmt in FORMATS:
        record = ExpertRecord(fmt, DIM, INTER)
        records = _records(record, memory)
        experts[fmt.name], expert_output_ns = expert_points(records, record)
        matrices[fmt.name], matrix_output_ns = matrix_points(records, record)
    matrix_s, eager_s = beginnings(records, record)
    absorbed_ns = _absorbed_ns()
    return {
        "experts": experts,
        "matrices": matrices,
        "expert_output_ns": expert_output_ns,
        "matrix_output_ns": matrix_output_ns,
        "experts_s": experts_beginning_s(records, record),
        "matrix_s": matrix_s,
        "eager_s": eager_s,
        "heads_ns": _heads_ns(_heads(records, record), absorbed_ns),
        "absorbed_ns": absorbed_ns,
        "decompressed_ns": _decompressed_ns(),
    }


def _records(record: ExpertRecord, memory: Tensor) -> Tensor:
    """Random experts, as many calls of them as `memory` holds, and at least one."""
    count = max(TOUCHED, memory.nbytes // record.nbytes // TOUCHED * TOUCHED)
    room = memory if memory.nbytes >= count * record.nbytes else huge_memory(count * record.nbytes)
    records = room[: count * record.nbytes].view(count, record.nbytes)
    fill_records(record, records, 0)
    return records


def _steps() -> dict[str, float]:
    """A small kernel's call in a row of others, and a value of many that are converted."""
    weight, x = torch.ones(WIDTH), torch.randn(1, WIDTH)

    def row() -> Tensor:
        y = x
        for _ in range(STEPS):
            y = model_ops.rms_norm(y, weight, 1e-6)
        return y

    many = torch.randn(TENSORS, MANY_ROWS, WIDTH)  # more than caches hold, as weights are read between small steps
    [convert] = called(lambda: [converted(each, torch.bfloat16) for each in many])
    [seconds] = played(row)
    return {"call_s": seconds / STEPS, "value_ns": core_ns(convert, many.numel())}


def _heads(records: Tensor, record: ExpertRecord) -> list[Tensor]:
    """Two packed wkv_b of each matrix: [heads, tiles, blocks, bytes of a block]."""
    blocks, size = HEADS * (NOPE + VALUE) * LORA // BLOCK, record.format.block_bytes
    parts = [part for matrix in matrices_of(records, record) for part in matrix.split(blocks * size)[:2]]
    whole = [part for part in parts if part.numel() == blocks * size]
    return [part.view(HEADS, (NOPE + VALUE) // TILE_ROWS, LORA // BLOCK_K, size) for part in whole]


def _heads_ns(heads: Sequence[Tensor], absorbed_ns: float) -> float:
    """A block of packed wkv_b in the absorbed form: what is left without the multiplications of a short context."""
    queries, cached = _queries(1), torch.randn(NEAR, LORA + ROPE).bfloat16()

    def work() -> Tensor:
        for wkv_b in heads:
            out = model_ops.attend_absorbed(*queries, cached, wkv_b, 0.1)
        return out

    blocks = heads[0].numel() / heads[0].shape[-1]
    [seconds] = played(work)
    each = core_ns(seconds, len(heads))
    return max(1.0, (each - absorbed_ns * _absorbed_work(NEAR)) / blocks)


def _absorbed_ns() -> float:
    """A multiplication of the absorbed form: of a long context, without those of a shorter one."""
    wkv_b = torch.randn(HEADS, NOPE + VALUE, LORA).bfloat16()

    queries, cached = _queries(1), torch.randn(FAR, LORA + ROPE).bfloat16()
    far, near = played(
        lambda: model_ops.attend_absorbed(*queries, cached, wkv_b, 0.1),
        lambda: model_ops.attend_absorbed(*queries, cached[: FAR // 2], wkv_b, 0.1),
        typical=min,
    )
    return core_ns(max(far - near, 1e-6), _absorbed_work(FAR) - _absorbed_work(FAR // 2))


def _absorbed_work(seen: int) -> int:
    """Multiplications of one token's absorbed attention to so many."""
    return HEADS * (seen * (2 * LORA + ROPE) + (NOPE + VALUE) * LORA)


def _decompressed_ns() -> float:
    """A multiplication of the decompressed form: of 512 tokens, without those of 256."""
    wkv_b, cached = torch.randn(HEADS, NOPE + VALUE, LORA).bfloat16(), torch.randn(SEEN, LORA + ROPE).bfloat16()

    def row(tokens: int) -> Callable[[], Tensor]:
        queries = _queries(tokens)
        return lambda: model_ops.attend_decompressed(*queries, cached, wkv_b, 0.1)

    more, fewer = called(row(512), row(256))
    pairs = 512 * (SEEN - 256) - 256 * (SEEN - 128)  # of a query and a key, half of the queries' own among them
    return core_ns(max(more - fewer, 1e-6), pairs * HEADS * (NOPE + ROPE + VALUE))


def _queries(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, HEADS, NOPE).bfloat16(), torch.randn(tokens, HEADS, ROPE).bfloat16()

"""What the cost model needs to know of this machine, measured in about a minute: offload/machine.py.

Nothing is a run of a model. Kernels run on random weights of a format, in shapes of no model:

    reading          plain reads of gigabytes, as in `dsr1 bench`
    a block's time   a layer of experts of a format, more of them than caches hold, at 1 to 256 tokens an expert
    steps            a row of small kernels as decoding plays them, and a norm over many values
    attention        both forms, on random queries and latents
"""

import platform
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from statistics import median

import psutil
import torch
from torch import Tensor

from offload.backend import CpuBackend
from offload.benchmark.limits import fastest_read
from offload.benchmark.measure import seconds_of
from offload.benchmark.weights import random_records
from offload.experts import CpuExperts, ExpertBuffers, PackedExperts
from offload.gpu_probe import measure_gpu
from offload.machine import Machine, Points
from offload.memory import huge_memory
from offload.this_machine import known_gpu
from offload.topology import read_topology
from quant import isa, model_ops
from quant.kernels.bandwidth import PAGE
from quant.kernels.threads import thread_count
from quant.packed import ACCURATE, BLOCK_K, FAST, Q8, TILE_ROWS, ExpertRecord, PackedFormat
from quant.shapes import known_shape
from quant.tape import PASSES, Repeated

FORMATS = (ACCURATE, FAST, Q8)
READ_BYTES = 3 * 2**30  # several times the largest caches
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)  # of an expert
DIM, INTER, TOP_K = 6144, 1536, 4  # of the layer that is measured: no model's
TOUCHED = 16  # experts of a call
STEPS, MANY_ROWS = 32, 512
RUNS = 5
Tell = Callable[[str], None]


def probe(tell: Tell) -> Machine:
    """Measure with as many threads as are set; takes up to 6 GiB of RAM, less where less is there.

    Kernels should be compiled before (quant/kernels/ahead.py).
    """
    tell("measuring the memory's read bandwidth")
    memory = huge_memory(min(READ_BYTES, psutil.virtual_memory().available // 4) // PAGE * PAGE).fill_(1)
    _, read = fastest_read(torch.tensor([[memory.data_ptr(), memory.nbytes // PAGE]]))
    tell("measuring kernels")
    kernels = {fmt.name: _block_points(fmt, memory.nbytes) for fmt in FORMATS}
    call_s, value_ns = _steps(memory)
    absorbed_ns, decompressed_ns = _attention()
    return Machine(
        name=platform.node() or "this machine",
        source="measured",
        date=date.today().isoformat(),
        cores=thread_count(),
        isa=isa.current(),
        nodes=len(read_topology().nodes),
        ram=psutil.virtual_memory().total,
        read_bytes_s=read.bytes_s,
        kernels=kernels,
        call_s=call_s,
        value_ns=value_ns,
        absorbed_ns=absorbed_ns,
        decompressed_ns=decompressed_ns,
        gpu=measure_gpu(known_gpu()),
    )


def _layer(fmt: PackedFormat, nbytes: int) -> tuple[CpuExperts, int]:
    """A layer of as many experts as fit `nbytes`, for calls that touch TOUCHED of them; and how many there are."""
    record = ExpertRecord(fmt, DIM, INTER)
    count = max(TOUCHED, nbytes // record.nbytes)
    shape = known_shape("moonshotai/Moonlight-16B-A3B")
    assert shape is not None
    config = replace(shape.config, dim=DIM, moe_inter_dim=INTER, n_routed_experts=count, n_activated_experts=TOP_K)
    backend = CpuBackend()
    buffers = ExpertBuffers(config, backend, TOUCHED * TOKENS[-1] // TOP_K)
    return CpuExperts(PackedExperts(random_records(record, count, 0), record), backend, buffers), count


def _block_points(fmt: PackedFormat, nbytes: int) -> Points:
    """(tokens of an expert, ns of a core for a block of weights from memory)."""
    layer, count = _layer(fmt, nbytes)
    blocks = TOUCHED * 3 * DIM * INTER // (TILE_ROWS * BLOCK_K)
    points, turn = [], 0
    for each in TOKENS:
        runs = []
        for _ in range(1 + RUNS):
            runs.append(_layer_s(layer, TOUCHED * each // TOP_K, turn * TOUCHED, count))
            turn += 1
        points.append((each, 1e9 * median(runs[1:]) * thread_count() / blocks))
    return tuple(points)


def _layer_s(layer: CpuExperts, tokens: int, first: int, count: int) -> float:
    """Seconds of a call for TOUCHED experts from `first` on, of `count` that go round."""
    ids = ((torch.arange(tokens * TOP_K) % TOUCHED + first) % count).view(tokens, TOP_K)
    x, weights = torch.randn(tokens, DIM).bfloat16(), torch.rand(tokens, TOP_K)
    return seconds_of(lambda: layer.sync(layer.submit(x, ids, weights)))


def _steps(memory: Tensor) -> tuple[float, float]:
    """Seconds of a small kernel's call in a row of others, and ns of a core for a value."""
    weight, x = torch.ones(DIM), torch.randn(1, DIM).bfloat16()

    def row() -> Tensor:
        y = x
        for _ in range(STEPS):
            y = torch.ops.dsr1.rms_norm(y, weight, 1e-6)
        return y

    repeated, runs = Repeated(), []
    with torch.inference_mode():
        for position in range(PASSES + RUNS):
            memory[: 64 * 2**20].sum()  # as weights do, push what is small out of the caches
            runs.append(seconds_of(lambda position=position: repeated.run(position, row)))  # type: ignore[misc]
        many = torch.randn(MANY_ROWS, DIM).bfloat16()
        values = [seconds_of(lambda: torch.ops.dsr1.rms_norm(many, weight, 1e-6)) for _ in range(1 + RUNS)]
    return median(runs[PASSES:]) / STEPS, 1e9 * median(values[1:]) * thread_count() / many.numel()


def _attention() -> tuple[float, float]:
    """ns of a core for a multiplication of the absorbed and of the decompressed form."""
    heads, nope, rope, lora, value, seen = 16, 128, 64, 512, 128, 4096
    cached = torch.randn(seen, lora + rope).bfloat16()
    wkv_b = torch.randn(heads, nope + value, lora).bfloat16()

    def timed(attend: Callable[..., Tensor], tokens: int) -> float:
        queries = torch.randn(tokens, heads, nope).bfloat16(), torch.randn(tokens, heads, rope).bfloat16()
        return median(seconds_of(lambda: attend(*queries, cached, wkv_b, 0.1)) for _ in range(RUNS))

    timed(model_ops.attend_absorbed, 1)
    each = heads * (seen * (2 * lora + rope) + (nope + value) * lora)
    absorbed = timed(model_ops.attend_absorbed, 4) - timed(model_ops.attend_absorbed, 1)
    more = timed(model_ops.attend_decompressed, 512) - timed(model_ops.attend_decompressed, 256)
    scale = 1e9 * thread_count()
    return scale * max(absorbed, 1e-6) / (3 * each), scale * max(more, 1e-6) / (
        256 * heads * seen * (nope + rope + value)
    )

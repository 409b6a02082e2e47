"""The probe of this machine, on little memory: its kernels run, and its figures are such as a processor can have."""

import json
import math

import pytest
import torch

from offload import probe as probe_module
from offload import probe_rows
from offload.backend import CpuBackend
from offload.benchmark.weights import random_records
from offload.experts import CpuExperts, ExpertBuffers, PackedExperts
from offload.machine import Machine
from offload.probe_memory import waiting_ns
from quant.config import parse_config
from quant.formats import FORMATS, QuantTensor
from quant.packed import ACCURATE, FAST, ExpertRecord, PackedFormat
from tests.tiny_checkpoint import TINY

CONFIG = parse_config(TINY)  # 16 experts of (256, 128)
SMALL = {"DIM": 768, "INTER": 384, "EXPERT_TOKENS": (1, 8), "MATRIX_TOKENS": (1, 4, 8), "RUNS": 1, "HEADS": 1}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (probe_module, probe_rows):
        for name, value in SMALL.items():
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(probe_module, "READ_BYTES", 2**24)
    monkeypatch.setattr(probe_module, "TENSORS", 1)
    monkeypatch.setattr(probe_module, "FORMATS", (ACCURATE, FAST))


@pytest.mark.usefixtures("small")
def test_figures_are_of_the_right_size() -> None:
    machine = probe_module.probe(lambda _: None)
    assert Machine.from_fields(json.loads(machine.to_json()), "probe") == machine
    assert [tokens for tokens, _ in machine.experts["accurate"]] == [1, 8]
    assert [tokens for tokens, _ in machine.matrices["fast"]] == [1, 4, 8] and "f32" in machine.matrices
    tables = (*machine.experts.values(), *machine.matrices.values())
    assert all(1 < ns < 1e7 for points in tables for _, ns in points)
    assert 1e8 < machine.read_bytes_s < 1e13 and machine.date
    for seconds in (machine.call_s, machine.eager_s, machine.experts_s, machine.matrix_s):
        assert 0 < seconds < 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("fmt", [ACCURATE, FAST], ids=lambda fmt: fmt.name)
def test_experts_of_another_shape_are_the_same_bytes(fmt: PackedFormat) -> None:
    """So results that there are more of are all that differs."""
    dim, inter, wider = SMALL["DIM"], SMALL["INTER"], probe_rows.WIDER
    record, other = ExpertRecord(fmt, dim, inter), ExpertRecord(fmt, dim // wider, inter * wider)
    assert record.nbytes == other.nbytes
    records = random_records(record, 16, 0)
    several = probe_rows.ProbeExperts(records, other)
    assert several.outputs == 2 * inter * wider + dim // wider
    with torch.inference_mode():
        assert several.whole(4)().isfinite().all()


def test_results_count_apart_from_blocks() -> None:
    assert probe_rows._without([(1, 100.0), (10, 400.0), (100, 1000.0)], 2.0) == ((1, 98), (10, 380), (100, 800))
    assert probe_rows._without([(100, 100.0)], 2.0) == ((100, 25.0),)  # noise leaves something


def layer(weights: object) -> CpuExperts:
    backend = CpuBackend()
    return CpuExperts(weights, backend, ExpertBuffers(CONFIG, backend, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", [ACCURATE, FAST], ids=lambda fmt: fmt.name)
def test_memory_of_the_probe_s_own_kind_is_as_fast(fmt: PackedFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    record = ExpertRecord(fmt, CONFIG.dim, CONFIG.moe_inter_dim)
    layers = [layer(PackedExperts(random_records(record, 16, seed), record)) for seed in range(2)]
    waiting = waiting_ns(layers)
    assert math.isfinite(waiting) and abs(waiting) < 1e4
    monkeypatch.setattr("offload.probe_memory.played", lambda *rows: [len(rows) * 3.0, 1.0])
    blocks = 32 * 2 * CONFIG.dim * CONFIG.moe_inter_dim / 2048
    expected = 1e9 * (6.0 - 1.0) * probe_rows.thread_count() / blocks / fmt.block_bytes
    assert waiting_ns(layers) == pytest.approx(expected)


def test_plain_experts_are_not_compared() -> None:
    matrices = [torch.zeros(shape).bfloat16() for shape in ((128, 256), (256, 128), (128, 256))]
    expert = tuple(QuantTensor(FORMATS["bf16"], tuple(data.shape), data) for data in matrices)
    assert waiting_ns([layer([expert] * 16)]) == 0 == waiting_ns([])

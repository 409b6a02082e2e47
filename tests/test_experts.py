"""CPU experts behind submit and sync: their results, the order of their work, and what they refuse."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from offload.backend import Backend, CpuBackend, Event, Stream
from offload.experts import CpuExperts, ExpertBuffers, ExpertWeights, PackedExperts
from offload.recording import Operation, RecordingBackend
from quant.config import ModelConfig, parse_config
from quant.formats import BF16, FP8_BLOCK, Format, QuantTensor
from quant.fp8 import encode
from quant.packed import FAST, PACKED_FORMATS, ExpertRecord, PackedFormat
from quant.packing import decode
from tests.test_packed_kernels import LAYER_NMSE, even_packed
from tests.tiny_checkpoint import TINY

CONFIG: ModelConfig = parse_config(TINY)
DIM, INTER, EXPERTS, TOP_K = CONFIG.dim, CONFIG.moe_inter_dim, CONFIG.n_routed_experts, CONFIG.n_activated_experts
CAPACITY = 12


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_weight(fmt: Format, rows: int, columns: int) -> QuantTensor:
    values = torch.randn(rows, columns) / columns**0.5
    return encode(values) if fmt is FP8_BLOCK else QuantTensor(fmt, (rows, columns), values.to(fmt.dtype))


def make_experts(fmt: Format = FP8_BLOCK) -> list[ExpertWeights]:
    shapes = ((INTER, DIM), (DIM, INTER), (INTER, DIM))
    return [tuple(make_weight(fmt, *shape) for shape in shapes) for _ in range(EXPERTS)]  # type: ignore[misc]


def make_layer(backend: Backend, fmt: Format = FP8_BLOCK) -> CpuExperts:
    return CpuExperts(make_experts(fmt), backend, ExpertBuffers(CONFIG, backend, CAPACITY))


def route(tokens: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights) [tokens, TOP_K]."""
    ids = torch.rand(tokens, EXPERTS, device=device).argsort(1)[:, :TOP_K].contiguous()
    return ids, torch.rand(tokens, TOP_K, device=device)


def make_records(fmt: PackedFormat) -> PackedExperts:
    """Random codes, with weights whose products are near 1."""
    rng, record = np.random.default_rng(0), ExpertRecord(fmt, DIM, INTER)
    records = torch.zeros(EXPERTS, record.nbytes, dtype=torch.uint8)
    for row in records.numpy():
        joined = np.concatenate([even_packed(fmt, s, rng) for s in ((INTER, DIM), (INTER, DIM), (DIM, INTER))])
        row[: len(joined)] = joined
    return PackedExperts(records, record)


def matrices(experts: CpuExperts, expert: int) -> list[torch.Tensor]:
    """w1, w2 and w3 of one expert in float64."""
    if not isinstance(experts.weights, PackedExperts):
        return [w.dequantize(torch.float64) for w in experts.weights[expert]]
    record, data = experts.weights.record, experts.weights.records[expert].numpy()
    places = ((record.w1, (INTER, DIM)), (record.w2, (DIM, INTER)), (record.w3, (INTER, DIM)))
    decoded = (decode(data[at : at + record.format.nbytes(s)], record.format, s) for at, s in places)
    return [torch.from_numpy(matrix).double() for matrix in decoded]


def naive(experts: CpuExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for expert, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            w1, w2, w3 = matrices(experts, expert)
            row = x[t].double()
            out[t] += weight * (w2 @ (F.silu(w1 @ row) * (w3 @ row)))
    return out


@pytest.mark.parametrize("fmt", [FP8_BLOCK, BF16], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("tokens", [1, 5, CAPACITY])
def test_experts_compute_the_weighted_sum(fmt: Format, tokens: int) -> None:
    layer = make_layer(CpuBackend(), fmt)
    x, (ids, weights) = torch.randn(tokens, DIM), route(tokens)
    out, expected = layer.sync(layer.submit(x, ids, weights)), naive(layer, x, ids, weights)
    assert out.dtype == torch.float32 and (out - expected).square().sum() < 1e-11 * expected.square().sum()
    half = layer.sync(layer.submit(x.bfloat16(), ids, weights))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, layer.sync(layer.submit(x.bfloat16().float(), ids, weights)).bfloat16())


@pytest.mark.parametrize("fmt", PACKED_FORMATS.values(), ids=PACKED_FORMATS)
@pytest.mark.parametrize("tokens", [1, CAPACITY])
def test_packed_experts_compute_the_weighted_sum(fmt: PackedFormat, tokens: int) -> None:
    backend = CpuBackend()
    buffers = ExpertBuffers(CONFIG, backend, CAPACITY)
    layer, other = CpuExperts(make_records(fmt), backend, buffers), CpuExperts(make_experts(), backend, buffers)
    x, (ids, weights) = torch.randn(tokens, DIM).bfloat16(), route(tokens)
    plain = other.sync(other.submit(x, ids, weights))  # layers of both kinds share buffers
    out, expected = layer.sync(layer.submit(x.float(), ids, weights)), naive(layer, x, ids, weights)
    assert out.dtype == torch.float32
    assert (out - expected).square().sum() < LAYER_NMSE * expected.square().sum()
    assert torch.equal(layer.sync(layer.submit(x, ids, weights)), out.bfloat16())
    assert torch.equal(other.sync(other.submit(x, ids, weights)), plain)


def test_records_of_another_layer_are_refused() -> None:
    backend, good = CpuBackend(), make_records(FAST)
    buffers = ExpertBuffers(CONFIG, backend, 1)
    for records in (good.records[:, :-4096].contiguous(), good.records[:0], good.records[0]):
        with pytest.raises(ValueError, match=f"not those of a layer of experts with {DIM} columns"):
            CpuExperts(PackedExperts(records, good.record), backend, buffers)
    for records in (good.records.view(torch.int8), good.records[:, :-4096], good.records.to("meta")):
        with pytest.raises(ValueError, match="contiguous uint8 in host memory"):
            CpuExperts(PackedExperts(records, good.record), backend, buffers)
    with pytest.raises(ValueError, match="not those of a layer"):
        CpuExperts(PackedExperts(good.records, ExpertRecord(FAST, DIM // 2, 2 * INTER)), backend, buffers)


def test_w1_is_the_gate_and_w3_is_not() -> None:
    experts = make_experts(BF16)
    zero = QuantTensor(BF16, (INTER, DIM), torch.zeros(INTER, DIM, dtype=torch.bfloat16))
    open_gate = QuantTensor(BF16, (INTER, DIM), torch.full((INTER, DIM), 1.0, dtype=torch.bfloat16))
    backend = CpuBackend()
    layer = CpuExperts([(open_gate, experts[0][1], zero)] * EXPERTS, backend, ExpertBuffers(CONFIG, backend, 1))
    assert not layer.sync(layer.submit(torch.ones(1, DIM), *route(1))).any()


def test_results_outlive_the_next_submit_and_layers_share_buffers() -> None:
    backend = CpuBackend()
    buffers = ExpertBuffers(CONFIG, backend, CAPACITY)
    first, second = (CpuExperts(make_experts(), backend, buffers) for _ in range(2))
    x, (ids, weights) = torch.randn(4, DIM), route(4)
    kept = first.sync(first.submit(x, ids, weights))
    copy = kept.clone()
    other = second.sync(second.submit(x, ids, weights))
    assert torch.equal(kept, copy) and not torch.equal(kept, other)


def test_more_tokens_than_the_buffers_hold_are_refused() -> None:
    layer = make_layer(CpuBackend())
    with pytest.raises(ValueError, match="13 tokens do not fit expert buffers for 12"):
        layer.submit(torch.randn(13, DIM), *route(13))


def test_overtaken_and_synced_work_is_refused() -> None:
    layer = make_layer(CpuBackend())
    x, (ids, weights) = torch.randn(2, DIM), route(2)
    abandoned, latest = layer.submit(x, ids, weights), layer.submit(x, ids, weights)
    with pytest.raises(RuntimeError, match="not the latest"):
        layer.sync(abandoned)
    layer.sync(latest)
    with pytest.raises(RuntimeError, match="it was synced"):
        layer.sync(latest)


def test_abandoned_work_frees_its_inputs() -> None:
    layer = make_layer(CpuBackend())
    x, (ids, weights) = torch.randn(2, DIM), route(2)
    pending = layer.submit(x, ids, weights)
    layer.buffers.abandon()
    assert layer.buffers.pending is None
    with pytest.raises(RuntimeError, match="not the latest"):
        layer.sync(pending)
    assert layer.sync(layer.submit(x, ids, weights)).isfinite().all()


def test_experts_out_of_range_are_refused_and_leave_the_layer_usable() -> None:
    layer = make_layer(CpuBackend())
    x, (ids, weights) = torch.randn(2, DIM), route(2)
    with pytest.raises(IndexError, match=r"outside -1 \.\. 15"):
        layer.submit(x, ids.clone().fill_(EXPERTS), weights)
    assert layer.sync(layer.submit(x, ids, weights)).isfinite().all()


def test_unlike_experts_are_refused() -> None:
    backend = CpuBackend()
    buffers = ExpertBuffers(CONFIG, backend, 1)
    mixed = [*make_experts()[:3], make_experts(BF16)[0]]
    with pytest.raises(ValueError, match="expert 3 has a matrix of torch.bfloat16"):
        CpuExperts(mixed, backend, buffers)
    w1, w2, w3 = make_experts()[0]
    with pytest.raises(ValueError, match="expert 0 has a matrix"):
        CpuExperts([(w1, w3, w2)], backend, buffers)
    with pytest.raises(ValueError, match="at least one"):
        CpuExperts([], backend, buffers)


def test_order_of_work() -> None:
    backend = RecordingBackend(CpuBackend())
    layer = make_layer(backend)
    backend.operations.clear()
    layer.sync(layer.submit(torch.randn(2, DIM), *route(2)))
    queued = [operation for operation in backend.operations if operation.kind != "free"]
    order = [(operation.kind, operation.stream, operation.event) for operation in queued]
    assert order == [
        ("record", "main", 0),
        ("wait", "experts", 0),
        ("copy", "experts", -1),
        ("copy", "experts", -1),
        ("copy", "experts", -1),
        ("launch", "experts", -1),
        ("record", "experts", 1),
        ("allocate", "", -1),
        ("wait", "main", 1),
        ("copy", "main", -1),
    ]


def races(operations: list[Operation]) -> list[tuple[int, int]]:
    """Pairs of operations that use one buffer, one of them writing it, with no order between their streams.

    A clock says how many operations of each stream are surely done: a stream's own, and those an event told it of.
    """
    clocks: dict[str, dict[str, int]] = {}
    recorded: dict[int, dict[str, int]] = {}
    uses: list[tuple[int, Operation, int]] = []
    found = []
    for number, operation in enumerate(operations):
        clock = clocks.setdefault(operation.stream, {})
        if operation.kind == "record":
            recorded[operation.event] = dict(clock)
        elif operation.kind == "wait":
            for stream, done in recorded.get(operation.event, {}).items():
                clock[stream] = max(clock.get(stream, 0), done)
        elif operation.kind in ("copy", "launch"):
            clock[operation.stream] = clock.get(operation.stream, 0) + 1
            for other, before, position in uses:
                shared = {*operation.writes} & {*before.reads, *before.writes} | {*operation.reads} & {*before.writes}
                if shared and clock.get(before.stream, 0) < position:
                    found.append((other, number))
            uses.append((number, operation, clock[operation.stream]))
    return found


def recorded_layers(drop: Callable[[Operation], bool]) -> list[Operation]:
    """The operations of three forward passes of two layers, less those that `drop` names."""
    backend = RecordingBackend(CpuBackend())
    buffers = ExpertBuffers(CONFIG, backend, CAPACITY)
    layers = [CpuExperts(make_experts(), backend, buffers) for _ in range(2)]
    x = torch.randn(3, DIM)
    for _ in range(3):
        for layer in layers:
            x = layer.sync(layer.submit(x, *route(3)))
    return [operation for operation in backend.operations if not drop(operation)]


def test_no_buffer_is_used_by_two_streams_without_an_order() -> None:
    assert not races(recorded_layers(lambda operation: False))


@pytest.mark.parametrize("kind", ["wait", "record"])
@pytest.mark.parametrize("event", [0, 1])
def test_every_event_is_needed(kind: str, event: int) -> None:
    assert races(recorded_layers(lambda operation: operation.kind == kind and operation.event == event))


class LateBackend(CpuBackend):
    """Work on side streams runs as late as events allow: when `main` waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_host = False
        self.queue: list[Callable[[], Any]] = []
        self.reached: dict[Event, int] = {}

    def record(self, event: Event, stream: Stream) -> None:
        self.reached[event] = 0 if stream is self.main else len(self.queue)

    def wait(self, event: Event, stream: Stream) -> None:
        if stream is self.main:
            for work in self.queue[: self.reached[event]]:
                work()
            del self.queue[: self.reached[event]]

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: Stream) -> None:
        if stream is self.main:
            super().copy(dst, src, stream)
        else:
            self.queue.append(lambda: dst.copy_(src))

    def launch(self, stream: Stream, function: Callable[..., Any], *args: Any) -> None:
        self.queue.append(lambda: function(*args))


def test_a_device_that_works_as_late_as_it_may_gets_the_same_results() -> None:
    late = LateBackend()
    layer = make_layer(late)
    same = CpuExperts(layer.weights, CpuBackend(), ExpertBuffers(CONFIG, CpuBackend(), CAPACITY))
    for tokens in (3, 1, CAPACITY):
        x, (ids, weights) = torch.randn(tokens, DIM).bfloat16(), route(tokens)
        pending = layer.submit(x, ids, weights)
        assert len(late.queue) == 4
        assert torch.equal(layer.sync(pending), same.sync(same.submit(x, ids, weights)))


def test_fake_tensors_on_a_device_that_is_not_there() -> None:
    with FakeTensorMode():
        backend = RecordingBackend(CpuBackend("cuda"))
        fake = torch.empty(INTER, DIM, dtype=torch.float8_e4m3fn)
        scale = torch.empty(INTER // 128, DIM // 128)
        w1 = QuantTensor(FP8_BLOCK, (INTER, DIM), fake, scale)
        w2 = QuantTensor(FP8_BLOCK, (DIM, INTER), fake.T.contiguous(), scale.T.contiguous())
        buffers = ExpertBuffers(CONFIG, backend, CAPACITY)
        layer = CpuExperts([(w1, w2, w1)] * EXPERTS, backend, buffers)
        assert buffers.x.device.type == "cpu"
        x = torch.empty(5, DIM, dtype=torch.bfloat16, device="cuda")
        ids = torch.empty(5, TOP_K, dtype=torch.int64, device="cuda")
        out = layer.sync(layer.submit(x, ids, torch.empty(5, TOP_K, device="cuda")))
        assert out.device.type == "cuda" and out.dtype == torch.bfloat16 and out.shape == (5, DIM)
        record = ExpertRecord(FAST, DIM, INTER)
        packed = PackedExperts(torch.empty(EXPERTS, record.nbytes, dtype=torch.uint8), record)
        layer = CpuExperts(packed, backend, buffers)
        assert layer.sync(layer.submit(x, ids, torch.empty(5, TOP_K, device="cuda"))).device.type == "cuda"
        with pytest.raises(ValueError, match="keeps shape and dtype"):
            layer.submit(x, torch.empty(5, 2, dtype=torch.int64, device="cuda"), torch.empty(5, 2, device="cuda"))

"""The order of events: enough for a thousand random schedules, and found wanting when one thing in it is wrong."""

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload.backend import Backend, CpuBackend, Event, Stream
from offload.deferral import Deferral
from offload.experts import CpuExperts, ExpertBuffers, PackedExperts
from offload.graphs import GraphingBackend
from offload.order import violations
from offload.recording import Operation, RecordingBackend, uses
from offload.streamed_experts import Staging, StreamedExperts
from quant.config import ModelConfig, parse_config
from quant.packed import FAST, ExpertRecord
from tests.tiny_checkpoint import TINY

CONFIG: ModelConfig = parse_config({**TINY, "hidden_size": 128, "n_routed_experts": 8, "moe_intermediate_size": 16})
CAPACITY, SCHEDULES = 4, 1000
KINDS = ("run_on_cpu", "run_graph", "run_streamed", "run_deferring", "run_deferring_graph")


class RandomBackend(CpuBackend):
    """A device whose streams run beside each other: work on side streams is done at random moments, as events allow.

    `main` is the thread that queues. A stream's queue holds work, and marks of events to wait for.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.is_host, self.random = False, random.Random(seed)
        self.queues: dict[Stream, list[Callable[[], None] | tuple[Stream, int]]] = {}
        self.done: dict[Stream, int] = {}
        self.reached: dict[Event, tuple[Stream, int]] = {}

    def stream(self, name: str) -> Stream:
        stream = Stream(name)
        self.queues[stream], self.done[stream] = [], 0
        return stream

    def record(self, event: Event, stream: Stream) -> None:
        if stream is not self.main:
            self.reached[event] = (stream, self.done[stream] + len(self.queues[stream]))
        else:
            self.reached.pop(event, None)  # main has done all that it was given

    def wait(self, event: Event, stream: Stream) -> None:
        if event not in self.reached:
            return
        if stream is self.main:
            self._reach(*self.reached[event])
        else:
            self.queues[stream].append(self.reached[event])
        self._stroll()

    def copy(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        self._queue(stream, lambda: dst.copy_(src))

    def launch(self, stream: Stream, function: Callable[..., Any], *args: Any) -> None:
        self._queue(stream, lambda: function(*args))

    def synchronize(self) -> None:
        for stream, queue in self.queues.items():
            self._reach(stream, self.done[stream] + len(queue))

    def _queue(self, stream: Stream, work: Callable[[], None]) -> None:
        self._stroll()
        if stream is self.main:
            work()
        else:
            self.queues[stream].append(work)
        self._stroll()

    def _reach(self, stream: Stream, count: int) -> None:
        while self.done[stream] < count:
            self._step(stream)

    def _stroll(self) -> None:
        """Let side streams go on by a few steps."""
        for stream in self.random.sample(list(self.queues), len(self.queues)):
            for _ in range(self.random.choice((0, 0, 0, 1, 2, 9))):
                if self.queues[stream]:
                    self._step(stream)

    def _step(self, stream: Stream) -> None:
        first = self.queues[stream].pop(0)
        self.done[stream] += 1
        if callable(first):
            first()
        else:
            self._reach(*first)


class Tape(TorchDispatchMode):
    """A graph of operators for tests: what runs while it records is run again, into the same memory, by each replay.

    It is entered around a whole capture.
    """

    def __init__(self, backend: RecordingBackend) -> None:
        super().__init__()
        self.backend, self.records = backend, False
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.backend.unseen():
            out = func(*args, **(kwargs or {}))
        if self.records:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def begin(self) -> None:
        self.calls, self.records = [], True

    def end(self) -> Callable[[], None]:
        self.records = False
        calls, backend = self.calls, self.backend
        used = [uses(*call) for call in calls]
        own = backend.buffers([written for _, written in used])
        reads = tuple(number for number in backend.buffers([read for read, _ in used]) if number not in own)

        def replay() -> None:
            backend.operations.append(Operation("replay", backend.main.name, reads, own))
            with backend.unseen():
                for func, args, kwargs, out in calls:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                        if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                            old.copy_(new)

        return replay


class Layers:
    """Two layers of experts on a backend, on the CPU and streamed, and three of which two defer an expert."""

    def __init__(self, backend: Backend, tape: Tape | None = None) -> None:
        self.backend, self.tape = backend, tape
        self.buffers = ExpertBuffers(CONFIG, backend, CAPACITY)
        self.cpu = [CpuExperts(packed, backend, self.buffers) for packed in RECORDS]
        deferrals = [Deferral(experts=layer < 2, joins=layer > 0) for layer in range(3)]
        self.deferring = [
            CpuExperts(RECORDS[layer % 2], backend, self.buffers, deferral) for layer, deferral in enumerate(deferrals)
        ]
        self.staging = Staging(backend, RECORDS[0].record.nbytes, CONFIG.n_routed_experts, size=3)
        whole = [(0, CONFIG.n_routed_experts)]
        self.streamed = [StreamedExperts(packed, whole, self.staging) for packed in RECORDS]
        self.steps: dict[tuple[int, bool], tuple[Tensor, Any]] = {}

    def run_on_cpu(self, x: Tensor, deferring: bool = False) -> Tensor:
        for layer in self.deferring if deferring else self.cpu:
            pending = layer.submit(x, *choices(x))
            shared = x * 0.5
            x = (shared + layer.sync(pending)).tanh()
        return x

    def run_streamed(self, x: Tensor) -> Tensor:
        for layer in self.streamed:
            pending = layer.submit(x, *choices(x))
            x = (x * 0.5 + layer.sync(pending)).tanh()
        return x

    def run_deferring(self, x: Tensor) -> Tensor:
        return self.run_on_cpu(x[:1], deferring=True)

    def run_deferring_graph(self, x: Tensor) -> Tensor:
        return self.run_graph(x[:1], deferring=True)

    def run_graph(self, x: Tensor, deferring: bool = False) -> Tensor:
        """As a decoding step: captured when a number of tokens first comes, replayed from its fixed input."""
        assert isinstance(self.backend, GraphingBackend) and self.tape is not None
        key = len(x), deferring
        if key not in self.steps:
            fixed = x.clone()
            with self.tape:
                self.steps[key] = fixed, self.backend.capture(lambda: self.run_on_cpu(fixed, deferring))
        fixed, step = self.steps[key]
        fixed.copy_(x)
        result: Tensor = step.replay()
        return result.clone()


def make_packed(seed: int) -> PackedExperts:
    generator = torch.Generator().manual_seed(seed)
    record = ExpertRecord(FAST, CONFIG.dim, CONFIG.moe_inter_dim)
    records = torch.randint(0, 256, (CONFIG.n_routed_experts, record.nbytes), dtype=torch.uint8, generator=generator)
    for first in range(0, record.w2 + FAST.nbytes((CONFIG.dim, CONFIG.moe_inter_dim)), FAST.block_bytes):
        d = records[:, first : first + 64].view(torch.int16)
        d[:, 1::2] = 0x3A00  # 2^-11
    return PackedExperts(records, record)


RECORDS = [make_packed(seed) for seed in range(2)]


def choices(x: Tensor) -> tuple[Tensor, Tensor]:
    """Experts that depend on x [T, dim], and their weights."""
    scores = x[:, : CONFIG.n_routed_experts]
    chosen = scores.topk(CONFIG.n_activated_experts, dim=-1)
    return chosen.indices, chosen.values.softmax(-1)


def recording(seed: int) -> tuple[RecordingBackend, Layers]:
    backend = RecordingBackend(RandomBackend(seed))
    tape = Tape(backend)
    return backend, Layers(GraphingBackend(backend, tape), tape)


def schedule(seed: int) -> list[tuple[str, Tensor]]:
    """Passes in random order: how, and of which x [T, dim]."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kinds = rng.choices(KINDS, (3, 5, 1, 2, 3), k=rng.randint(2, 4))
    return [(kind, torch.randn(rng.randint(1, CAPACITY), CONFIG.dim, generator=generator)) for kind in kinds]


@pytest.fixture(scope="module", autouse=True)
def in_inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.usefixtures("one_thread", "one_kernel_thread")
def test_a_thousand_random_schedules() -> None:
    """Whatever moments the streams choose, results are those of one stream, and everything has an order."""
    plain = Layers(CpuBackend())
    checked = 0
    for seed in range(SCHEDULES):
        backend, layers = recording(seed)
        for kind, x in schedule(seed):
            expected = getattr(plain, kind.replace("_graph", "_on_cpu").replace("deferring_on_cpu", "deferring"))(x)
            with backend.counting():
                found = getattr(layers, kind)(x)
            assert torch.equal(found, expected), (seed, kind)
        assert violations(backend.operations) == [], seed
        checked += len(backend.operations)
    assert checked > 100 * SCHEDULES


Mistake = Callable[[str, tuple[Any, ...]], tuple[Any, ...] | None]


class MistakenBackend(RecordingBackend):
    """Makes one mistake: `mistake` gets each call's name and arguments, and may change these, or drop the call."""

    mistake: Mistake

    def record(self, event: Event, stream: Stream) -> None:
        self._call("record", event, stream)

    def wait(self, event: Event, stream: Stream) -> None:
        self._call("wait", event, stream)

    def copy(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        self._call("copy", dst, src, stream)

    def _call(self, name: str, *args: Any) -> None:
        changed = self.mistake(name, args)
        if changed is not None:
            getattr(super(), name)(*changed)


def read_early(layers: Layers) -> Mistake:
    """The model's copy of the experts' results does not wait for them."""
    event = layers.buffers.outputs_ready
    return lambda name, args: None if name == "wait" and args[0] is event else args


def reuse(layers: Layers) -> Mistake:
    """A slice is uploaded over one that may still be multiplied."""
    events = [slot.consumed for slot in layers.staging.slots]
    return lambda name, args: None if name == "wait" and args[0] in events else args


def missing_wait(layers: Layers) -> Mistake:
    """Inputs of experts are copied whether they have been computed or not."""
    return lambda name, args: None if name == "wait" and args[1] is layers.buffers.stream else args


def wrong_stream(layers: Layers) -> Mistake:
    """Slices are uploaded on the stream that gathers the next ones; the events are recorded as they were."""

    def mistake(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        moved = name == "copy" and args[2] is layers.staging.upload
        return (*args[:2], layers.staging.gather) if moved else args

    return mistake


def test_without_mistakes_there_is_nothing_to_find() -> None:
    assert found_with(lambda layers: lambda name, args: args) == []


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (read_early, "copy .* on main reads buffer .* before its write on experts"),
        (reuse, "copy .* on upload writes buffer .* before its use on main"),
        (missing_wait, "copy .* on experts reads buffer .* before its write on main"),
        (wrong_stream, "run .* on main reads buffer .* before its write on gather"),
    ],
)
def test_every_seeded_mistake_is_found(make: Callable[[Layers], Mistake], says: str) -> None:
    assert any(re.match(says, sentence) for sentence in found_with(make))


def found_with(make: Callable[[Layers], Mistake]) -> list[str]:
    """What is found in a few passes of each kind with a mistake."""
    backend = MistakenBackend(CpuBackend())
    backend.mistake = lambda name, args: args
    layers = Layers(backend)
    backend.mistake = make(layers)
    for _ in range(2):
        with backend.counting():
            layers.run_streamed(layers.run_on_cpu(torch.randn(2, CONFIG.dim)))
            layers.run_deferring(torch.randn(1, CONFIG.dim))
    return violations(backend.operations)


class Addresses(Tape):
    """As CUDA's graphs: it knows addresses and keeps nothing alive."""

    def end(self) -> Callable[[], None]:
        super().end()
        used = [uses(*call) for call in self.calls]
        reads, writes = (self.backend.buffers([each[side] for each in used]) for side in (0, 1))
        self.calls = []
        return lambda: self.backend.operations.append(Operation("replay", self.backend.main.name, reads, writes))


@pytest.mark.parametrize("freed", [False, True])
def test_a_graph_with_a_stale_address_is_found(freed: bool) -> None:
    backend = RecordingBackend(CpuBackend())
    tape = Addresses(backend)
    graphing = GraphingBackend(backend, tape)
    fixed, result = torch.randn(3), torch.zeros(3)
    with backend.counting(), tape:
        step = graphing.capture(lambda: result.add_(fixed))
    with backend.counting():
        fixed.fill_(1)
        step.replay()
        if freed:
            fixed = torch.randn(3)
        step.replay()
    found = violations(backend.operations)
    assert [sentence for sentence in found if "a stale address" in sentence] == found
    assert bool(found) == freed

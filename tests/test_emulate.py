"""The emulated device: what its ledger counts, when it refuses, and that the workspace formula holds on real models."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybrid_rt import latent_attention
from hybrid_rt.cache import LatentCache
from hybrid_rt.latent_attention import CachedAttention
from hybrid_rt.loader import load_transformer
from hybrid_rt.rope import softmax_scale
from offload import workspace
from offload.backend import Backend
from offload.emulate import BUFFERS, TEMPORARIES, EmulatedBackend, Ledger
from offload.experts import ExpertBuffers
from offload.machine import load_machine
from offload.parts import Budget
from offload.pins import parse_pins
from offload.plan import Plan
from offload.planner import Planning, make_plan
from offload.this_machine import TYPICAL
from offload.workspace import host_bytes
from quant.checkpoint import Checkpoint
from quant.errors import DeviceError
from quant.kernels import set_threads, thread_count
from tests.tiny_checkpoint import RAGGED, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

MIB = 2**20
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture
def backend() -> EmulatedBackend:
    return EmulatedBackend(Ledger(MIB))


def test_the_ledger_rounds_up_as_cudas_allocator_does() -> None:
    ledger = Ledger(2048)
    assert [ledger.take("a", 1), ledger.take("b", 513), ledger.take("b", 0)] == [512, 1024, 0]
    assert (ledger.used, ledger.left, ledger.peak) == (1536, 512, 1536)
    ledger.give("b", 1024)
    assert ledger.used_by == {"a": 512, "b": 0} and ledger.peak_by == {"a": 512, "b": 1024}
    assert (ledger.used, ledger.peak) == (512, 1536)


def test_the_ledger_refuses_to_pass_its_budget_and_counts_nothing_then() -> None:
    ledger = Ledger(MIB)
    ledger.take("attention", MIB - 512)
    with pytest.raises(DeviceError, match=r"the cache asks for 1.0 KiB .* 512 bytes of 1.0 MiB are left; .*--gpu-mem"):
        ledger.take("the cache", 1024)
    assert ledger.used == ledger.peak == MIB - 512
    ledger.take("the cache", 512)
    assert ledger.left == 0


def test_allocated_memory_counts_until_the_last_view_is_gone(backend: EmulatedBackend) -> None:
    as_protocol: Backend = backend
    tensor = as_protocol.allocate((100, 10), torch.float32)
    pinned = as_protocol.allocate((100, 10), torch.float32, pinned=True)
    view = tensor[50:]
    del tensor
    gc.collect()
    assert backend.ledger.used == backend.ledger.used_by[BUFFERS] == 4096 and pinned.numel() == 1000
    del view
    assert backend.ledger.used == 0 and backend.ledger.peak == 4096
    with pytest.raises(DeviceError):
        backend.allocate((MIB,), torch.float32)


def test_placed_weights_count_once_each(backend: EmulatedBackend) -> None:
    mapped = torch.arange(4096, dtype=torch.uint8)
    whole, part = backend.place("head", mapped), backend.place("attention", mapped[:1000])
    assert torch.equal(part, mapped[:1000]) and torch.equal(whole, mapped)
    assert backend.ledger.used_by == {"head": 4096, "attention": 1000}
    del part
    assert backend.ledger.used_by["attention"] == 0 and backend.ledger.used == 4096


def test_temporaries_count_while_they_live(backend: EmulatedBackend) -> None:
    x = torch.ones(1024)
    with backend.counting():
        y = x + 1
        assert backend.ledger.used_by[TEMPORARIES] == 4096
        z = y.view(2, 512)[1:].t()  # views
        y.mul_(2).exp_()  # in place
        assert backend.ledger.used == 4096
        del y
        assert backend.ledger.used == 4096
        del z
        assert backend.ledger.used == 0
        outside = x.float().contiguous()  # x itself
        assert backend.ledger.used == 0
        low = x.bfloat16()
        assert backend.ledger.used == 2048
    after = x + 1
    assert backend.ledger.used == 2048 and backend.ledger.peak == 4096
    del low, after, outside
    assert backend.ledger.used == 0


@pytest.mark.parametrize("inference", [False, True])
def test_operators_made_of_others_are_taken_apart(backend: EmulatedBackend, inference: bool) -> None:
    """`to` and `reshape` may return their input or a copy; inference mode does not say which."""
    x, w = torch.ones(8, 16, 32).transpose(0, 1), torch.ones(32, 4)
    with torch.inference_mode(inference), backend.counting():
        kept = [x.to(torch.float32), x.reshape(16, 8, 2, 16)]
        assert backend.ledger.used == 0
        kept += [x.to(torch.bfloat16)]
        assert backend.ledger.used == 2 * x.numel()
        kept += [x.reshape(128, 32)]
        assert backend.ledger.used == (2 + 4) * x.numel()
        kept += [x @ w]
        assert backend.ledger.used == (2 + 4) * x.numel() + 4 * 128 * 4
    assert torch.equal(kept[-1], torch.full((16, 8, 4), 32.0))


def test_launched_work_and_host_buffers_do_not_count(backend: EmulatedBackend) -> None:
    def work(x: torch.Tensor) -> None:
        x += torch.ones(1000) * 2

    with backend.counting():
        host = backend.allocate((1000,), torch.float32, pinned=True)
        backend.launch(backend.main, work, host.zero_())
        assert backend.ledger.peak == 0
        device = backend.allocate((1000,), torch.float32)
        backend.copy(device, host, backend.main)
        assert backend.ledger.used_by == {BUFFERS: 4096}
    assert device.tolist() == [2] * 1000


def test_a_failing_launch_leaves_counting_on(backend: EmulatedBackend) -> None:
    def fail() -> None:
        raise IndexError

    with backend.counting():
        with pytest.raises(IndexError):
            backend.launch(backend.main, fail)
        kept = torch.ones(128)
        assert backend.ledger.used == 512 and kept.sum() == 128


def test_an_operator_that_passes_the_budget_is_refused(backend: EmulatedBackend) -> None:
    with backend.counting():
        kept = torch.zeros(MIB // 8)  # half
        with pytest.raises(DeviceError, match="the workspace"):
            torch.zeros(MIB // 4)
        assert backend.ledger.used == MIB // 2
        again = kept + 1
    assert backend.ledger.left == 0 and again.sum() == MIB // 8


MANY_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16}
WIDE_MLP = {"intermediate_size": 8192}
WIDE = {"hidden_size": 2048, "kv_lora_rank": 64, "num_hidden_layers": 2}


def peak_of_a_pass(folder: Path, dtype: str, chunk: int) -> tuple[int, Plan]:
    """The most that temporaries take in passes of `chunk` and of 128 tokens that follow others, with their logits."""
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    backend = EmulatedBackend(Ledger(2**40))
    budget = Budget("emulate", 2**40, 2**40, 4096, dtype)  # type: ignore[arg-type]
    pins = parse_pins([f"chunk={chunk}"])
    planning = Planning(
        checkpoint.inventory, lambda spec: checkpoint.representations(spec.name), budget, load_machine(TYPICAL), pins
    )
    plan = make_plan(planning)
    buffers = ExpertBuffers(config, backend, chunk)
    model = load_transformer(checkpoint, plan, DTYPES[dtype], backend, buffers)
    cache = LatentCache(config, 4096, dtype, backend)
    cache.data.normal_()
    for tokens in (chunk, min(chunk, 128)):
        cache.length = 4096 - tokens
        with torch.inference_mode(), backend.counting():
            context = CachedAttention(cache, tokens, softmax_scale(config))
            states = model(torch.arange(tokens) % config.vocab_size, context)
            logits = model.head(states[-1:]).float()
        assert logits.isfinite().all()
        del context, states, logits
        assert backend.ledger.used_by[TEMPORARIES] == 0
    return backend.ledger.peak_by[TEMPORARIES], plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [({}, 512), ({}, 256), ({}, 128), (MANY_HEADS, 300), (WIDE_MLP, 512), (RAGGED, 512), (WIDE, 256)],
)
def test_the_workspace_formula_bounds_what_a_forward_pass_takes(
    shape: dict[str, int], chunk: int, dtype: str, tmp_path: Path
) -> None:
    peak, plan = peak_of_a_pass(write_checkpoint(tmp_path, shape), dtype, chunk)
    formula = plan.workspace_bytes
    print(f"{dtype}, {chunk} tokens: {peak} bytes, formula {formula / peak:.2f} of that")
    assert peak <= formula <= 2 * peak


def test_the_formula_uses_the_numbers_of_attention() -> None:
    for name in ("ABSORBED_UP_TO", "PREFILL_BLOCK", "DECODE_BLOCK"):
        assert getattr(workspace, name) == getattr(latent_attention, name)


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("quant.kernels.threads.MAX_THREADS", 64)
    before = thread_count()
    set_threads(64)
    yield
    set_threads(before)


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("shape", [{}, RAGGED, MANY_HEADS])
def test_the_formula_of_host_buffers_bounds_them(shape: dict[str, int], tmp_path: Path) -> None:
    config = Checkpoint.open(write_checkpoint(tmp_path, shape)).config
    buffers = ExpertBuffers(config, EmulatedBackend(Ledger(0)), 512)
    tensors = (buffers.x, buffers.ids, buffers.weights, buffers.out, buffers.order, buffers.scratch)
    taken = sum(tensor.nbytes for tensor in tensors)
    assert taken <= host_bytes(config, 512) <= 3 * taken

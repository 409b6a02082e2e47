"""Recorded passes: they give the bits of passes that are not recorded, and what cannot be recorded is not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_rt.engine import Engine
from hybrid_rt.layers import add, rms_norm, silu_times
from quant.kernels import set_threads, thread_count
from quant.tape import NotRecordableError, Repeated, _OnlyKernels, empty, recording
from tests.tiny_checkpoint import BF16, NO_Q_LORA, RAGGED, write_checkpoint
from tests.tiny_tokenizer import write_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHT = torch.ones(8)


def two_norms(x: torch.Tensor) -> torch.Tensor:
    return rms_norm(rms_norm(x, WEIGHT, 1e-6), WEIGHT, 1e-6)


@torch.inference_mode()
def test_a_played_pass_reads_its_inputs_anew() -> None:
    x, repeated, calls = torch.zeros(1, 8), Repeated(), []

    def work() -> torch.Tensor:
        calls.append(1)
        return add(two_norms(x), x)

    for position in range(6):
        x.copy_(torch.randn(1, 8))
        assert torch.equal(repeated.run(position, work), two_norms(x) + x)
    assert len(calls) == 3 and repeated.tape is not None


@torch.inference_mode()
def test_what_grows_with_the_position_goes_on_growing() -> None:
    """Rows of a table: each pass reads the next one."""
    table, repeated = torch.randn(40, 8), Repeated()
    for position in [5, 6, 7, 8, 9, 30, 0, 39]:
        row = table[position : position + 1]
        expected = two_norms(row)
        got = repeated.run(position, lambda row=row: two_norms(row))
        assert torch.equal(got, expected)
    assert repeated.tape is not None


@torch.inference_mode()
def test_recording_starts_again_until_three_positions_follow_each_other() -> None:
    table, repeated = torch.randn(40, 8), Repeated()
    for position, recorded in [(3, 1), (4, 2), (9, 1), (9, 1), (10, 2), (11, 0)]:
        row = table[position : position + 1]
        assert torch.equal(repeated.run(position, lambda row=row: two_norms(row)), two_norms(row))
        assert len(repeated.passes) == recorded
    assert repeated.tape is not None


@torch.inference_mode()
@pytest.mark.parametrize(
    "work",
    [
        lambda x: x + 1,
        lambda x: torch.cat([x, x]),
        lambda x: two_norms(x.mul_(2)),
        lambda x: rms_norm(x.half().float(), WEIGHT, 1e-6),
        lambda x: two_norms(x.expand(2, 8).contiguous()),
    ],
)
def test_what_no_kernel_computes_is_refused_and_then_run_as_it_is(work: Any) -> None:
    with pytest.raises(NotRecordableError), recording():
        work(torch.ones(1, 8))
    repeated = Repeated()
    for position in range(5):
        assert torch.equal(repeated.run(position, lambda: work(torch.ones(1, 8))), work(torch.ones(1, 8)))
    assert repeated.tape is None and not repeated.possible


@torch.inference_mode()
def test_passes_that_differ_otherwise_are_not_played() -> None:
    x, table, repeated = torch.ones(1, 8), torch.randn(40, 8), Repeated()
    for position in range(6):
        row = table[position**2 : position**2 + 1]  # does not grow by the same amount
        assert torch.equal(repeated.run(position, lambda row=row: two_norms(row)), two_norms(row))
    assert repeated.tape is None
    repeated = Repeated()
    for position in range(6):
        work = (lambda: silu_times(x, x)) if position % 2 else (lambda: add(x, x))
        assert torch.equal(repeated.run(position, work), work())
    assert repeated.tape is None


@torch.inference_mode()
def test_views_and_conversions_are_recorded() -> None:
    with recording() as made:
        x = empty(4, 8, dtype=torch.bfloat16)
        rms_norm(x.unflatten(1, (2, 4)).flatten(1).view(2, 16)[:, :8], WEIGHT, 1e-6)
    assert len(made.calls) == 1 and len(made.tensors) == 2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [{}, RAGGED, BF16 | NO_Q_LORA], ids=["fp8", "ragged", "bf16"])
def test_a_model_decodes_to_the_same_bits(
    shape: dict[str, Any], dtype: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, shape, shards=1)
    write_tokenizer(folder)
    before = thread_count()
    engine = Engine.load(folder, device="cpu", dtype=dtype, context=64, threads=threads)
    set_threads(threads)
    ids = torch.randint(400, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    played, session = [], engine.session()
    for token in [*ids, *ids[:5]]:
        if len(session.tokens) == 20:
            session.trim(7)  # back to an earlier position
        played.append(session.append([token]))
    assert session.cache.step is not None and session.cache.step.repeated.tape is not None
    monkeypatch.setattr(Repeated, "run", lambda self, position, work: work())
    plain, session = [], engine.session()
    for token in [*ids, *ids[:5]]:
        if len(session.tokens) == 20:
            session.trim(7)
        plain.append(session.append([token]))
    set_threads(before)
    assert torch.equal(torch.stack(played), torch.stack(plain))


def test_a_traced_model_calls_its_modules(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=1)
    write_tokenizer(folder)
    engine = Engine.load(folder, device="cpu", dtype="float32", context=64)
    engine.prefill_chunk = 1
    assert engine.trace(list(range(8)))["hidden"].shape[1] == 8


def test_recording_does_not_wake_torch_s_compiler() -> None:
    """torch would wrap the mode's method in one that imports torch._dynamo: a second at a user's first token."""
    assert not hasattr(_OnlyKernels.__torch_dispatch__, "__wrapped__")

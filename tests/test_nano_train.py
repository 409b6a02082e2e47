"""Training nano-r1: the loss falls, a resumed run goes on as if nothing had happened."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant.config import ModelConfig
from tools.nano_r1.model import Rows, causal_attention, grouped_mm, nano_config, pack
from tools.nano_r1.train import CHECKPOINT, Options, Trainer, rate_at

TINY = replace(nano_config(), dim=64, inter_dim=64, n_layers=2, n_heads=2, q_lora_rank=64, kv_lora_rank=64)


def examples(seed: int) -> Rows:
    """Counting up from a random start: a rule that a tiny model finds quickly."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 40, (15, 1), generator=rng) + torch.arange(16)
    return pack(ids, torch.ones(ids.shape).index_fill(1, torch.tensor([0]), 0), 256)


def trainer(tmp_path: Path, config: ModelConfig = TINY) -> Trainer:
    return Trainer(Options(out=tmp_path, compiled=False, warmup=0.0001), config, progress=lambda: 0.3)


def test_the_loss_falls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainee = trainer(tmp_path)
    losses = [trainee.step(examples(seed))["loss"] for seed in range(25)]
    assert losses[0] == pytest.approx(torch.log(torch.tensor(512.0)).item(), abs=0.01)
    assert losses[-1] < 0.5 * losses[0]


def test_a_resumed_run_takes_the_same_next_step(tmp_path: Path) -> None:
    whole, resumed = trainer(tmp_path), trainer(tmp_path)
    for seed in range(3):
        whole.step(examples(seed))
    whole.save(tmp_path / CHECKPOINT)
    resumed.restore(tmp_path / CHECKPOINT)
    assert whole.step(examples(3)) == resumed.step(examples(3))
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
    for name, bias in whole.trainee.parts.biases.items():
        assert torch.equal(bias, resumed.trainee.parts.biases[name]), name


def test_padding_is_not_counted_as_load(tmp_path: Path) -> None:
    trainee = trainer(tmp_path)
    trainee.step(examples(0))
    assert trainee.load[0].sum() == 15 * 16 * TINY.n_activated_experts


def test_rates_rise_stay_and_fall() -> None:
    options = Options(out=Path())
    assert [rate_at(at, options) for at in (0.2, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]
    assert rate_at(0.0, options) < rate_at(0.005, options) < 1.0


def test_grouped_mm_is_one_product_an_expert() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 8, generator=rng, requires_grad=True)
    weight = torch.randn(3, 6, 8, generator=rng, requires_grad=True)
    ends = torch.tensor([5, 5, 20])
    naive = torch.cat([rows[:5] @ weight[0].T, rows[5:] @ weight[2].T])
    assert torch.allclose(grouped_mm(rows, weight, ends), naive, atol=1e-6)
    expected = torch.autograd.grad(naive.square().sum(), (rows, weight))
    ours = torch.autograd.grad(grouped_mm(rows, weight, ends).square().sum(), (rows, weight))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, expected, strict=True))


def test_attention_sees_its_own_row_up_to_itself() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(70, 2, 16, generator=rng, requires_grad=True) for _ in range(3))
    out, _ = causal_attention(q, k, v, torch.tensor([4, 16]), 0.3)

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t[:64].view(4, 16, 2, 16).transpose(1, 2)

    scores = (rows(q) @ rows(k).mT * 0.3).masked_fill(torch.ones(16, 16).triu(1).bool(), float("-inf"))
    naive = (scores.softmax(-1) @ rows(v)).transpose(1, 2).reshape(64, 2, 16)
    assert torch.allclose(out[:64], naive, atol=1e-5) and not out[64:].any()
    expected = torch.autograd.grad(naive.square().sum(), (q, k, v))
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, expected, strict=True))

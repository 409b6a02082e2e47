"""Training nano-r1: the loss falls, a resumed run goes on as if nothing had happened, and what is written out runs."""

from pathlib import Path

import pytest
import torch

from hybrid_rt.engine import Engine
from hybrid_rt.evaluate.batch import decode_greedily
from quant.checkpoint import Checkpoint
from quant.config import ModelConfig, parse_config
from tools.nano_r1.evaluate import Score, examine, load_checkpoint
from tools.nano_r1.export import export
from tools.nano_r1.model import CONFIG, PackedContext, Rows, Trainee, causal_attention, grouped_mm, pack
from tools.nano_r1.optim import orthogonalize
from tools.nano_r1.train import CHECKPOINT, Options, Trainer, rate_at

FIELDS = CONFIG | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
}
TINY = parse_config(FIELDS)


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


def test_orthogonal_matrices_come_out() -> None:
    stack = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    for wide in (orthogonalize(stack), orthogonalize(stack.mT).mT):
        values = torch.linalg.svdvals(wide)
        assert values.min() > 0.6 and values.max() < 1.3


def next_tokens(trainee: Trainee, ids: list[int]) -> torch.Tensor:
    """Logits [L, vocab] without a cache."""
    rows = pack(torch.tensor([ids]), torch.ones(1, len(ids)), len(ids))
    with torch.no_grad():
        states = trainee.model(rows.ids, PackedContext(trainee.config, rows.positions, rows.shape))
        return trainee.model.head(states)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A tiny trained model, and the folder that it was exported to."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("nano")
    trainee = trainer(out)
    for seed in range(10):
        trainee.step(examples(seed))
    trainee.save(out / CHECKPOINT)
    assert export(out / CHECKPOINT, out / "exported", FIELDS).config == TINY
    return trainee, out / "exported"


def test_the_exported_model_says_what_the_trained_one_says(trained: tuple[Trainer, Path]) -> None:
    trainee, folder = trained
    engine = Engine.load(folder, dtype="float32", context=64)
    ids = list(range(8, 28))
    expected = next_tokens(trainee.trainee, ids)
    difference = (engine.logits(ids) - expected).abs().max()
    assert difference < 0.05 * expected.abs().max()  # FP8 rounds to 3 bits after the first
    exported = next_tokens(load_checkpoint(Checkpoint.open(folder)), ids)
    assert torch.allclose(engine.logits(ids), exported, atol=1e-3)


def test_decoding_many_at_once_is_decoding_each(trained: tuple[Trainer, Path]) -> None:
    model = load_checkpoint(Checkpoint.open(trained[1]))
    prompts = [[10, 11, 12], [20], [30, 31, 32, 33, 34]]
    for prompt, answer in zip(prompts, decode_greedily(model.model, TINY, prompts, 6, 8), strict=True):
        logits = next_tokens(model, prompt + answer)
        assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_use_counts_every_token_once_a_layer(trained: tuple[Trainer, Path]) -> None:
    use = examine(load_checkpoint(Checkpoint.open(trained[1])), [([8, 9, 10, 11], 1), (list(range(12, 30)), 4)])
    assert use.tokens.sum(1).tolist() == [(4 + 18) * TINY.n_activated_experts] * 2
    assert use.drafted == 2 + 14 and 0 <= use.accepted <= use.drafted  # the second token has no draft


def test_wilson_interval() -> None:
    low, high = Score("add", 95, 100, 1.0).interval()
    assert (low, high) == pytest.approx((0.8882, 0.9785), abs=1e-4)

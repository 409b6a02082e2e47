"""The whole model against independent references (tests/reference.py), and the same comparison with known mistakes.

Each variant is compared twice: with a stored reference, and with what transformers, where it is installed, computes
from a checkpoint of a new seed. The seed is part of the test's id; `pytest --reference-seed N` takes it again.
"""

import importlib.util
import secrets
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_rt import attention, gate, latent_attention
from hybrid_rt.cache import LatentCache
from hybrid_rt.engine import Engine
from hybrid_rt.latent_attention import CachedAttention
from hybrid_rt.moe import MoE
from hybrid_rt.rope import Angles, inverse_frequencies
from hybrid_rt.sampling import Sampling
from tests.reference import (
    STORED_ROWS,
    STORED_SEED,
    VARIANTS,
    Reference,
    digests,
    load_stored,
    make_reference,
    write_variant,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
NEW_SEED = secrets.randbelow(10**6)
ROW_LIMIT = 1e-4  # of |ours - reference| / |reference|, each position; correct code reaches 1e-6
MISTAKE_SHOWS = 1e-2  # every known mistake exceeds the limit a hundredfold
TIE = 1e-4  # of the best two logits, from which on greedy continuations may part
LOW_PRECISION_MEDIAN, SAME_EXPERTS = 0.05, 0.75


@cache
def load_engine(folder: Path, dtype: str) -> Engine:
    return Engine.load(folder, dtype=dtype, context=256, threads=1)


@dataclass(frozen=True)
class Case:
    """A checkpoint and its reference."""

    folder: Path
    reference: Reference

    def engine(self, dtype: str = "float32") -> Engine:
        return load_engine(self.folder, dtype)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption("--reference-seed")
    seeds = {"stored": STORED_SEED} | ({"seed": NEW_SEED if option is None else option} if HAS_TRANSFORMERS else {})
    keys = [(variant, kind, seed) for variant in VARIANTS for kind, seed in seeds.items()]
    ids = [f"{variant}-{kind}{seed}" for variant, kind, seed in keys]
    metafunc.parametrize("case", keys, ids=ids, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    variant, kind, seed = request.param
    folder = write_variant(tmp_path_factory.mktemp(variant), variant, seed)
    return Case(folder, stored_reference(variant, folder) if kind == "stored" else make_reference(folder, seed))


def stored_reference(variant: str, folder: Path) -> Reference:
    reference, stored = load_stored(variant)
    now = digests(folder)
    if now["random"] != stored["random"]:
        pytest.skip("torch draws other random weights on this machine than those the stored reference is of")
    assert now == stored, "the test checkpoints have changed; run `python -m tests.reference`"
    return reference


@pytest.fixture
def stored_case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """The stored case of the variant that a test names as the fixture's parameter; free to be spoilt."""
    folder = write_variant(tmp_path, request.param, STORED_SEED)
    return Case(folder, stored_reference(request.param, folder))


def row_errors(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Relative error of each row: [..., T] of [..., T, D]."""
    return (ours - reference).norm(dim=-1) / reference.norm(dim=-1)


def logit_errors(case: Case, dtype: str = "float32") -> torch.Tensor:
    """Of the reference's rows, when the prompt is appended in chunks of the engine's size."""
    engine, reference = case.engine(dtype), case.reference
    logits = engine.logits(reference.ids.tolist())
    assert logits.shape == (len(reference.ids), engine.config.vocab_size)
    return row_errors(logits[reference.rows], reference.logits)


def test_logits(case: Case) -> None:
    assert logit_errors(case).max() < ROW_LIMIT


def test_hidden_states_and_routing(case: Case) -> None:
    trace, reference = case.engine().trace(case.reference.ids.tolist()), case.reference
    assert trace["hidden"].shape[0] == case.engine().config.n_layers + 1
    assert row_errors(trace["hidden"][:, reference.rows], reference.hidden).max() < ROW_LIMIT
    assert torch.equal(trace["experts"], reference.experts)
    torch.testing.assert_close(trace["weights"], reference.weights, rtol=ROW_LIMIT, atol=1e-6)


def test_greedy_decoding(case: Case) -> None:
    session, reference = case.engine().session(), case.reference
    logits, ours = session.append(reference.prompt), []
    for _ in reference.greedy:
        ours.append(int(logits.argmax()))
        logits = session.append(ours[-1:])
    sure = clear_steps(reference)
    assert ours[:sure] == reference.greedy[:sure].tolist()


def test_generate_takes_the_same_tokens(case: Case) -> None:
    engine, reference = case.engine(), case.reference
    steps = list(engine.generate(reference.prompt, Sampling(temperature=0, max_new_tokens=len(reference.greedy))))
    ours, best = [step.token_id for step in steps], reference.greedy.tolist()
    sure = min(clear_steps(reference), tokens_of_text(best, engine.tokenizer.vocab_size), len(ours))
    assert ours[:sure] == best[:sure]
    assert ours[-1] in engine.tokenizer.eos_ids or len(ours) == len(best)


def clear_steps(reference: Reference) -> int:
    """Greedy steps before the first whose two best tokens are nearly alike."""
    return first_true(reference.greedy_margins < TIE)


def tokens_of_text(ids: list[int], vocab_size: int) -> int:
    """How many tokens come before the first that is only an embedding row, which `generate` never takes."""
    return first_true(torch.tensor(ids) >= vocab_size)


def first_true(mask: torch.Tensor) -> int:
    return int(torch.cat([mask, torch.tensor([True])]).int().argmax())


@pytest.fixture(autouse=True)
def both_forms_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the short prompts of these tests take the form of long chunks too."""
    monkeypatch.setattr(latent_attention, "ABSORBED_UP_TO", 8)


def test_bfloat16(case: Case) -> None:
    """One other choice of an expert changes its position by much, so medians are judged."""
    reference = case.reference
    assert logit_errors(case, "bfloat16").median() < LOW_PRECISION_MEDIAN
    trace = case.engine("bfloat16").trace(reference.ids.tolist())
    hidden = row_errors(trace["hidden"][:, reference.rows], reference.hidden)
    assert hidden.median(dim=-1).values.max() < LOW_PRECISION_MEDIAN
    same = (trace["experts"] == reference.experts).all(-1).float().mean(-1)
    assert same.min() >= SAME_EXPERTS


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 9, 64])
def test_prefill_in_chunks(case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case.engine(), "prefill_chunk", chunk)
    assert logit_errors(case).max() < ROW_LIMIT


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_pieces_and_blocks_of_any_size(case: Case, data: st.DataObject) -> None:
    """Appended in pieces, with blocks of attention so small that many boundaries fall among them."""
    engine, ids, last = case.engine(), case.reference.ids, len(case.reference.ids) - 1
    assert case.reference.rows[-1] == last
    cuts = sorted(data.draw(st.sets(st.integers(1, last), max_size=4), label="cuts"))
    session = engine.session()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFILL_BLOCK", "DECODE_BLOCK"):
            patch.setattr(latent_attention, name, data.draw(st.integers(1, 100), label=name))
        patch.setattr(engine, "prefill_chunk", data.draw(st.integers(4, 100), label="prefill_chunk"))
        for piece in torch.tensor_split(ids, cuts):
            logits = session.append(piece.tolist())
    assert row_errors(logits, case.reference.logits[-1]) < ROW_LIMIT


def mtp_logits(engine: Engine, ids: torch.Tensor) -> torch.Tensor:
    """Drafts [T - 1, vocab] of the MTP module, whose layer has a place in the cache of its own here."""
    config, tokens = engine.config, len(ids) - 1
    states = engine.forward(ids, engine.new_cache(len(ids)))
    one_more = replace(config, n_layers=config.n_layers + 1)
    context = CachedAttention(LatentCache(one_more, tokens, "float32", engine.backend), tokens, engine.scale)
    with torch.inference_mode():
        angles = engine.transformer.rope(context.positions)
        return engine.transformer.mtp[0](states[:-1], ids[1:], angles, context)


def test_multi_token_prediction(case: Case) -> None:
    reference = case.reference
    if case.engine().config.n_mtp_layers == 0:
        assert len(case.engine().transformer.mtp) == 0
        return
    if reference.mtp_logits is None:
        pytest.skip("this version of transformers has no MtpModel")
    ours = mtp_logits(case.engine(), reference.ids)
    rows = reference.rows[reference.rows < len(ours)]
    assert row_errors(ours[rows], reference.mtp_logits).max() < ROW_LIMIT


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
@pytest.mark.parametrize("stored_case", VARIANTS, indirect=True)
def test_stored_references_are_what_transformers_computes(stored_case: Case) -> None:
    rows, stored = torch.tensor(STORED_ROWS), stored_case.reference
    made = make_reference(stored_case.folder, STORED_SEED).thinned(rows)
    for field in fields(Reference):
        ours, theirs = getattr(made, field.name), getattr(stored, field.name)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4) if theirs is not None else None


Mistake = Callable[[Engine, pytest.MonkeyPatch], None]


def gates(engine: Engine) -> list[gate.Gate]:
    return [block.ffn.gate for block in engine.transformer.layers if isinstance(block.ffn, MoE)]


def in_gates(**values: object) -> Mistake:
    """Other values of the router's attributes."""

    def spoil(engine: Engine, patch: pytest.MonkeyPatch) -> None:
        for each in gates(engine):
            for name, value in values.items():
                patch.setattr(each, name, value)

    return spoil


def without_mscale(engine: Engine, _patch: pytest.MonkeyPatch) -> None:
    engine.scale = engine.config.qk_head_dim**-0.5


def mscale_once(engine: Engine, _patch: pytest.MonkeyPatch) -> None:
    engine.scale = (engine.scale * engine.config.qk_head_dim**-0.5) ** 0.5


def without_yarn(engine: Engine, _patch: pytest.MonkeyPatch) -> None:
    engine.transformer.rope.frequencies = inverse_frequencies(replace(engine.config, yarn=None))


def without_angle_gain(engine: Engine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine.transformer.rope, "gain", 1.0)


def rope_in_halves(_engine: Engine, patch: pytest.MonkeyPatch) -> None:
    def rotate(x: torch.Tensor, angles: Angles) -> torch.Tensor:
        cos, sin = (angles.cos, angles.sin) if x.dim() == 2 else (angles.cos[:, None], angles.sin[:, None])
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

    patch.setattr(attention, "rotate", rotate)


def bias_in_weights(_engine: Engine, patch: pytest.MonkeyPatch) -> None:
    def forward(self: gate.Gate, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        choice = torch.nn.functional.linear(x.float(), self.weight).sigmoid() + self.bias
        weights, ids = gate.limit_groups(choice, self.n_groups, self.n_limited_groups).topk(self.top_k, dim=-1)
        return ids, weights / weights.sum(-1, keepdim=True) * self.route_scale

    patch.setattr(gate.Gate, "forward", forward)


def without_bias(engine: Engine, _patch: pytest.MonkeyPatch) -> None:
    for each in gates(engine):
        each.bias = torch.zeros_like(each.bias)


def masked_with_zero(_engine: Engine, patch: pytest.MonkeyPatch) -> None:
    def forward(self: gate.Gate, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.nn.functional.linear(x.float(), self.weight).sigmoid()
        limited = gate.limit_groups(scores + self.bias, self.n_groups, self.n_limited_groups)
        ids = limited.masked_fill(limited.isinf(), 0).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        return ids, weights / weights.sum(-1, keepdim=True) * self.route_scale

    patch.setattr(gate.Gate, "forward", forward)


def without_shared_experts(engine: Engine, _patch: pytest.MonkeyPatch) -> None:
    for block in engine.transformer.layers:
        if isinstance(block.ffn, MoE):
            block.ffn.shared_experts.register_forward_hook(lambda _module, _args, output: output * 0)


def model_eps_in_latent_norm(engine: Engine, _patch: pytest.MonkeyPatch) -> None:
    for block in engine.transformer.layers:
        block.attn.kv_norm.eps = engine.config.norm_eps


MISTAKES: dict[str, tuple[str, Mistake]] = {
    "no mscale": ("published", without_mscale),
    "mscale once instead of squared": ("published", mscale_once),
    "no yarn": ("published", without_yarn),
    "no gain of the angles": ("bf16", without_angle_gain),
    "rope in halves": ("published", rope_in_halves),
    "rope in halves without yarn": ("plain", rope_in_halves),
    "bias in the weights": ("published", bias_in_weights),
    "no bias": ("published", without_bias),
    "no limit of groups": ("published", in_gates(n_groups=1, n_limited_groups=1)),
    "masked with 0": ("bf16", masked_with_zero),
    "no shared experts": ("ragged", without_shared_experts),
    "no scaling of the weights": ("published", in_gates(route_scale=1.0)),
    "weights not normalised": ("published", in_gates(norm_topk_prob=False)),
    "weights normalised": ("plain", in_gates(norm_topk_prob=True)),
    "the model's eps in kv_norm": ("plain", model_eps_in_latent_norm),
}


@pytest.mark.parametrize(("stored_case", "mistake"), MISTAKES.values(), indirect=["stored_case"], ids=MISTAKES)
def test_the_comparison_sees_mistakes(stored_case: Case, mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    assert logit_errors(stored_case).max() < ROW_LIMIT
    mistake(stored_case.engine(), monkeypatch)
    errors = logit_errors(stored_case)
    print(f"median {errors.median():.3f}, largest {errors.max():.3f}")
    assert errors.max() > MISTAKE_SHOWS

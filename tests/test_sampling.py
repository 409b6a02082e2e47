"""Sampling against transformers' warpers, plain mathematics and its own seed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_rt.sampling import Sampler, Sampling, SamplingError
from quant.errors import Dsr1Error

R1_ROWS = 129280


def logits_of(probs: list[float]) -> torch.Tensor:
    return torch.tensor(probs).log()


def kept(probs: list[float], **options) -> dict[int, float]:
    """What remains of `probs` at temperature 1, as id to probability."""
    sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0, **options})
    ids, left = Sampler(sampling, len(probs)).distribution(logits_of(probs))
    return dict(zip(ids.tolist(), left.tolist(), strict=True))


def naive_distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [V] in float64 with full sorts, written from the definitions."""
    probs = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_k:
        probs = probs.where(probs >= probs.sort(descending=True).values[sampling.top_k - 1], 0)
        probs /= probs.sum()
    order = probs.argsort(descending=True, stable=True)
    before = probs[order].cumsum(-1) - probs[order]
    probs[order[before >= sampling.top_p]] = 0
    probs = probs.where(probs >= sampling.min_p * probs.max(), 0)
    return probs / probs.sum()


def test_greedy_takes_the_lower_of_equals():
    assert Sampler(Sampling(temperature=0), 4).pick(torch.tensor([1.0, 3.0, 3.0, 2.0])) == 1


def test_padding_rows_are_never_taken():
    logits = torch.zeros(8)
    logits[5:] = 100
    assert Sampler(Sampling(temperature=0), 5).pick(logits) == 0
    sampler = Sampler(Sampling(temperature=2.0, top_p=1.0, seed=0), 5)
    assert {sampler.pick(logits) for _ in range(200)} == {0, 1, 2, 3, 4}


def test_temperature():
    assert kept([0.2, 0.8], temperature=0.5) == pytest.approx({0: 0.04 / 0.68, 1: 0.64 / 0.68})


def test_top_k_keeps_equals():
    assert kept([0.1, 0.5, 0.2, 0.2], top_k=2) == pytest.approx({1: 0.5 / 0.9, 2: 0.2 / 0.9, 3: 0.2 / 0.9})


def test_top_p_keeps_the_token_that_passes_it():
    assert kept([0.05, 0.5, 0.3, 0.15], top_p=0.6) == pytest.approx({1: 0.625, 2: 0.375})
    assert kept([0.05, 0.5, 0.3, 0.15], top_p=0.01) == {1: 1.0}


def test_top_p_counts_what_top_k_left():
    # 0.5 is less than 0.6 of everything, but 0.625 of the two that top-k leaves
    assert kept([0.05, 0.5, 0.3, 0.15], top_k=2, top_p=0.6) == {1: 1.0}


def test_min_p():
    assert set(kept([0.05, 0.5, 0.3, 0.15], min_p=0.31)) == {1, 2}
    assert set(kept([0.25, 0.5, 0.25], min_p=1.0)) == {1}


def test_tiny_temperature_is_greedy():
    assert Sampler(Sampling(temperature=1e-30), 3).pick(torch.tensor([5.0, 9.0, 8.9])) == 1


def test_ruled_out_tokens():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf])
    assert all(Sampler(Sampling(temperature=2.0, top_p=p), 3).pick(logits) == 1 for p in (0.9, 1.0))


@given(
    st.integers(0, 1000),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 40, 5000]),
    st.sampled_from([0.05, 0.5, 0.95, 0.999, 1.0]),
    st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=60, deadline=None)
def test_naive_mathematics(seed, temperature, top_k, top_p, min_p):
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) * 3
    sampling = Sampling(temperature=temperature, top_k=min(top_k, 3000), top_p=top_p, min_p=min_p)
    ids, probs = Sampler(sampling, 3000).distribution(logits)
    found = torch.zeros(3000, dtype=torch.float64)
    found[torch.from_numpy(ids)] = torch.from_numpy(probs)
    # A token at the edge of top-p may fall to either side by rounding.
    assert (found - naive_distribution(logits, sampling)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 50}, {"temperature": 1.5, "top_p": 1.0}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.8, "min_p": 0.1}],
)
def test_same_as_transformers(options):
    process = pytest.importorskip("transformers.generation.logits_process")
    sampling = Sampling(**options)
    logits = torch.randn(1, R1_ROWS, generator=torch.Generator().manual_seed(3)) * 3
    warped = process.TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        warped = process.TopKLogitsWarper(sampling.top_k)(None, warped)
    if sampling.top_p < 1:
        warped = process.TopPLogitsWarper(sampling.top_p)(None, warped)
    if sampling.min_p:
        warped = process.MinPLogitsWarper(sampling.min_p)(None, warped)
    expected = warped[0].double().softmax(-1)
    ids, probs = Sampler(sampling, R1_ROWS).distribution(logits[0])
    assert abs(len(ids) - int((expected > 0).sum())) <= 1  # their cumulative sum is in float32
    assert np.abs(expected[torch.from_numpy(ids)].numpy() - probs).max() < 1e-4


def test_seed_decides():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), 1000)
        return [sampler.pick(logits) for _ in range(20)]

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_a_drawn_seed_can_be_given_again():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first = Sampler(Sampling(temperature=1.0), 1000)
    second = Sampler(Sampling(temperature=1.0, seed=first.seed), 1000)
    assert [first.pick(logits) for _ in range(20)] == [second.pick(logits) for _ in range(20)]


def test_frequencies():
    probs = [0.1, 0.2, 0.3, 0.4]
    sampler = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=1), 4)
    counts = np.bincount([sampler.pick(logits_of(probs)) for _ in range(20000)], minlength=4)
    assert np.abs(counts / 20000 - probs).max() < 0.015


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_values_that_are_not_numbers(value, temperature):
    logits = torch.zeros(10)
    logits[4] = value
    with pytest.raises(Dsr1Error, match="not a number"):
        Sampler(Sampling(temperature=temperature), 10).pick(logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    assert Sampler(Sampling(temperature=0), 3).pick(torch.tensor([1, 3, 2], dtype=dtype)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("seed", -1),
        ("seed", 2**63),
        ("think_budget", -1),
    ],
)
def test_refused_options(name, value):
    with pytest.raises(SamplingError, match=f"^{name} is .*; it must be"):
        Sampling(**{name: value})
    assert issubclass(SamplingError, (Dsr1Error, ValueError))

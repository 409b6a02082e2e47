"""The router, with answers computed by hand. The weight is the identity, so x are the logits of the experts."""

import math
import random
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hybrid_rt.gate import Gate
from quant.config import parse_config
from tests.tiny_checkpoint import tiny_config

EXPERTS = 8


class GateParts:
    """The two tensors of a router (`Parts`)."""

    def __init__(self, bias: Sequence[float]) -> None:
        self.tensors = {"weight": torch.eye(EXPERTS), "bias": torch.tensor(bias)}

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        assert dtype is torch.float32
        return self.tensors[name.rsplit(".", 1)[-1]]


def gate(bias: Sequence[float] = (0.0,) * EXPERTS, **changes: object) -> Gate:
    """Of 8 experts in 4 groups: the best 2 of the best 2 groups, normalised, times 2.5."""
    fields = {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2} | changes
    return Gate(parse_config(tiny_config(fields)), 1, GateParts(bias))


def logits(*scores: float) -> torch.Tensor:
    """x [1, E] whose sigmoids are `scores`."""
    return torch.tensor([[math.log(score / (1 - score)) for score in scores]])


def route(router: Gate, *scores: float) -> dict[int, float]:
    """The weight of each expert chosen for the token with these scores, by the formula and by the kernel alike."""
    chosen = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            ids, weights = router(logits(*scores))
        assert ids.shape == weights.shape == (1, router.top_k)
        assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
        chosen.append(dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True)))
    assert chosen[0] == pytest.approx(chosen[1], rel=1e-6)
    return chosen[1]


def test_a_group_counts_as_the_sum_of_its_best_two() -> None:
    """Sums 1.0, 1.1, 1.05 and 0.4: the best expert of all, number 0, is in no chosen group."""
    chosen = route(gate(), 0.9, 0.1, 0.6, 0.5, 0.55, 0.5, 0.2, 0.2)
    assert chosen == pytest.approx({2: 2.5 * 0.6 / 1.15, 4: 2.5 * 0.55 / 1.15})


def test_only_the_best_two_of_a_group_count() -> None:
    """Two groups of four: 0.5 + 0.5 beats 0.6 + 0.3 + 0.3 + 0.3."""
    chosen = route(gate(n_group=2, topk_group=1), 0.6, 0.3, 0.3, 0.3, 0.5, 0.5, 0.1, 0.1)
    assert chosen == pytest.approx({4: 1.25, 5: 1.25})


def test_the_bias_chooses_and_does_not_weigh() -> None:
    """Biased scores .6 .6 | .8 .3 | .3 .3 | .2 .2: groups 0 and 1; experts 2, and 0 before 1 by a little."""
    router = gate([0.0, 0.1, 0.6, 0.1, -0.6, 0.0, 0.0, 0.0])
    chosen = route(router, 0.6, 0.49, 0.2, 0.2, 0.9, 0.3, 0.2, 0.2)
    assert chosen == pytest.approx({0: 2.5 * 0.6 / 0.8, 2: 2.5 * 0.2 / 0.8})


def test_experts_of_other_groups_are_not_chosen_when_all_choices_are_negative() -> None:
    """Masked with 0 instead of -inf, experts of groups 2 and 3 would beat the others."""
    chosen = route(gate([-1.0] * EXPERTS), 0.4, 0.3, 0.3, 0.3, 0.1, 0.1, 0.1, 0.2)
    assert set(chosen) <= {0, 1, 2, 3} and 0 in chosen
    assert chosen[0] == pytest.approx(2.5 * 0.4 / 0.7)


def test_every_expert_of_the_chosen_groups() -> None:
    """As many as the groups have: none is left but the masked ones."""
    chosen = route(gate([-1.0] * EXPERTS, num_experts_per_tok=4), 0.1, 0.1, 0.4, 0.2, 0.1, 0.1, 0.3, 0.1)
    assert chosen == pytest.approx({2: 1.0, 3: 0.5, 6: 0.75, 7: 0.25})


def test_one_group_limits_nothing() -> None:
    chosen = route(gate(n_group=1, topk_group=1), 0.9, 0.1, 0.6, 0.5, 0.55, 0.5, 0.2, 0.2)
    assert chosen == pytest.approx({0: 2.5 * 0.9 / 1.5, 2: 2.5 * 0.6 / 1.5})


def test_without_normalisation() -> None:
    chosen = route(gate(norm_topk_prob=False), 0.9, 0.1, 0.6, 0.5, 0.55, 0.5, 0.2, 0.2)
    assert chosen == pytest.approx({2: 1.5, 4: 1.375})


def test_the_scale_multiplies_normalised_weights() -> None:
    chosen = route(gate(routed_scaling_factor=1.0), 0.9, 0.1, 0.6, 0.5, 0.55, 0.5, 0.2, 0.2)
    assert sum(chosen.values()) == pytest.approx(1)


def test_scores_that_underflow_give_no_nan() -> None:
    for inference in (False, True):
        with torch.inference_mode(inference):
            _, weights = gate()(torch.full((1, EXPERTS), -200.0))
        assert weights.tolist() == [[0.0, 0.0]]


def test_tokens_are_routed_each_for_itself_and_in_float32() -> None:
    """Of a bfloat16 x, too: one token's choice hangs on a bias far below bfloat16's steps."""
    router = gate([0.0, 0.0, 0.0, 0.0, 0.0, 1e-5, 2e-5, 3e-5], n_group=1, topk_group=1)
    first, second = torch.zeros(1, EXPERTS), logits(0.9, 0.1, 0.6, 0.5, 0.55, 0.5, 0.2, 0.2)
    for inference in (False, True):
        with torch.inference_mode(inference):
            ids, weights = router(torch.cat([first, second]).bfloat16())
        assert sorted(ids[0].tolist()) == [6, 7] and sorted(ids[1].tolist()) == [0, 2]
        assert weights.dtype == torch.float32 and weights[0].tolist() == [1.25, 1.25]


def route_slowly(scores: list[float], bias: list[float], groups: int, limit: int, top_k: int) -> dict[int, float]:
    """The definition, expert by expert."""
    size = EXPERTS // groups
    choice = [score + extra for score, extra in zip(scores, bias, strict=True)]
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    worth = [sum(sorted(choice[expert] for expert in group)[-2:]) for group in members]
    allowed = [expert for group in sorted(range(groups), key=worth.__getitem__)[-limit:] for expert in members[group]]
    chosen = sorted(allowed, key=choice.__getitem__)[-top_k:]
    total = sum(scores[expert] for expert in chosen)
    return {expert: 2.5 * scores[expert] / total for expert in chosen}


def least_difference(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return min(b - a for a, b in pairwise(ordered))


@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 3), (2, 1, 3), (2, 2, 5), (4, 1, 2), (4, 2, 3), (4, 3, 6), (4, 4, 8)]),
    shift=st.sampled_from([-2.0, -0.5, 0.0, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_any_scores(shape: tuple[int, int, int], shift: float, seed: int) -> None:
    groups, limit, top_k = shape
    rng = random.Random(seed)
    scores = [rng.uniform(0.02, 0.98) for _ in range(EXPERTS)]
    bias = [shift + rng.uniform(-0.5, 0.5) for _ in range(EXPERTS)]
    choice = [score + extra for score, extra in zip(scores, bias, strict=True)]
    assume(least_difference(choice) > 1e-5)  # nearer ones are a tie in float32
    assume(least_difference([a + b for a, b in combinations(choice, 2)]) > 1e-5)
    router = gate(bias, n_group=groups, topk_group=limit, num_experts_per_tok=top_k)
    assert route(router, *scores) == pytest.approx(route_slowly(scores, bias, groups, limit, top_k), rel=1e-5)

"""The router's choice of experts, from its logits."""

from typing import NamedTuple

import numpy as np

from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner
from quant.kernels.silu import exp
from quant.kernels.tiles import floats, integers, share
from quant.kernels.vector import float_of_bits

ONE, TINY = np.float32(1), np.float32(1e-20)
LOWEST = np.float32(-np.inf)


class Router(NamedTuple):
    """Addresses and sizes of one call."""

    logits: int  # float32 [tokens, experts]
    bias: int  # float32 [experts]
    ids: int  # int64 [tokens, top_k]
    weights: int  # float32 [tokens, top_k]
    scratch: int  # float32 [parts, 2 * experts + groups]
    tokens: int
    experts: int
    groups: int
    limited_groups: int  # of which experts are taken
    top_k: int
    normalise: int  # whether a token's weights are divided by their sum
    scale: int  # float32 bits


ROUTER_FIELDS = len(Router._fields)


@inner
def _best(values):  # type: ignore[no-untyped-def]
    """Where the largest value is, the first one of equals; 0 if all are NaN."""
    best = 0
    for index in range(1, values.size):
        if values[index] > values[best]:
            best = index
    return best


@inner
def _group_score(choice):  # type: ignore[no-untyped-def]
    """A group is as good as the sum of its best two."""
    first, second = max(choice[0], choice[1]), min(choice[0], choice[1])
    for index in range(2, choice.size):
        value = choice[index]
        if value > first:
            first, second = value, first
        elif value > second:
            second = value
    return first + second


@inner
def _limit_groups(choice, groups, limited_groups, group_scores):  # type: ignore[no-untyped-def]
    """Set the choice of the experts outside the best groups to -inf."""
    size = choice.size // groups
    for group in range(groups):
        group_scores[group] = _group_score(choice[group * size : (group + 1) * size])
    for _ in range(groups - limited_groups):
        worst = 0
        for group in range(1, groups):
            if not group_scores[group] >= group_scores[worst]:
                worst = group
        group_scores[worst] = np.inf
        choice[worst * size : (worst + 1) * size] = LOWEST


@inner
def _choose(router, token, scratch):  # type: ignore[no-untyped-def]
    """Route one token. Of equal experts, the one with the lower id is chosen."""
    logits = floats(router.logits + token * router.experts * 4, (router.experts,))
    bias = floats(router.bias, (router.experts,))
    scores = floats(scratch, (router.experts,))
    choice = floats(scratch + router.experts * 4, (router.experts,))
    ids = integers(router.ids + token * router.top_k * 8, (router.top_k,))
    weights = floats(router.weights + token * router.top_k * 4, (router.top_k,))
    for expert in range(router.experts):
        scores[expert] = ONE / (ONE + exp(-logits[expert]))
        choice[expert] = scores[expert] + bias[expert]
    if router.groups > 1:
        _limit_groups(
            choice, router.groups, router.limited_groups, floats(scratch + router.experts * 8, (router.groups,))
        )
    total = TINY
    for slot in range(router.top_k):
        expert = _best(choice)
        choice[expert] = LOWEST
        ids[slot], weights[slot] = expert, scores[expert]
        total += scores[expert]
    factor = float_of_bits(np.int32(router.scale))
    for slot in range(router.top_k):
        weights[slot] = weights[slot] / total * factor if router.normalise else weights[slot] * factor


@inner
def _choose_share(router, part, parts):  # type: ignore[no-untyped-def]
    first, end = share(router.tokens, part, parts)
    for token in range(first, end):
        _choose(router, token, router.scratch + part * (2 * router.experts + router.groups) * 4)


def _route(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """The fields of Router."""
    _choose_share(Router(*arguments_of(arguments, ROUTER_FIELDS)), part, parts)
    return 0


route = Kernel(_route)

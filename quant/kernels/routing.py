"""Which tokens each expert of a layer works on: pairs (token, slot), sorted by expert.

`order` holds int64: where each expert's pairs start and the last ones end [experts + 1], the experts that have any
[experts], the sorted pairs [tokens * top_k], how many experts have any, and whether all this is done.
"""

from typing import NamedTuple

from quant.kernels.jit import inner, shared
from quant.kernels.team import barrier
from quant.kernels.tiles import integers


class Layer(NamedTuple):
    """Addresses and sizes of one call. x, out: float32 [tokens, dim]; ids, weights: [tokens, top_k].

    table: int64 [nodes * experts, ...]. code: of the format of w1 and w3; down_code: of w2's. granted: whether AMX's
    tiles may be used. Only packed weights have several nodes, tiles, or two formats.
    """

    x: int
    ids: int
    weights: int
    table: int
    out: int
    order: int
    scratch: int
    tokens: int
    top_k: int
    experts: int
    dim: int
    inter: int
    code: int
    down_code: int
    nodes: int
    granted: int


LAYER_FIELDS = len(Layer._fields)


@shared
def order_integers(tokens: int, top_k: int, experts: int) -> int:
    """int64 values of `order`."""
    return 2 * experts + 3 + tokens * top_k


@inner
def _order(layer):  # type: ignore[no-untyped-def]
    return integers(layer.order, (order_integers(layer.tokens, layer.top_k, layer.experts),))


@inner
def sort_pairs(layer):  # type: ignore[no-untyped-def]
    """Counting sort of the pairs by expert; False, with nothing read or written out of bounds, for a wrong id.

    Pairs of id -1 are left out: somebody else computes them. What stands for them behind the last pair is pair 0.
    """
    pairs, order = layer.tokens * layer.top_k, _order(layer)
    ids = integers(layer.ids, (pairs,))
    starts, cursors = order[: layer.experts + 1], order[layer.experts + 1 : 2 * layer.experts + 1]
    starts[:] = 0
    for pair in range(pairs):
        if ids[pair] < -1 or ids[pair] >= layer.experts:
            return False
        if ids[pair] >= 0:
            starts[ids[pair] + 1] += 1
    for expert in range(layer.experts):
        starts[expert + 1] += starts[expert]
        cursors[expert] = starts[expert]
    by_expert = order[2 * layer.experts + 1 : -2]
    by_expert[starts[layer.experts] :] = 0
    for pair in range(pairs):
        if ids[pair] >= 0:
            by_expert[cursors[ids[pair]]] = pair
            cursors[ids[pair]] += 1
    order[-2] = 0
    for expert in range(layer.experts):
        if starts[expert] < starts[expert + 1]:
            cursors[order[-2]] = expert
            order[-2] += 1
    return True


@inner
def sort_for_team(layer, team):  # type: ignore[no-untyped-def]
    """Let one thread sort for all; the others may do something else until the next barrier."""
    if team.part == 0:
        _order(layer)[-1] = 1 if sort_pairs(layer) else 0


@inner
def is_sorted(layer):  # type: ignore[no-untyped-def]
    """After that barrier: False for a wrong id."""
    return _order(layer)[-1] == 1


@inner
def sort_together(layer, team):  # type: ignore[no-untyped-def]
    """Both, and the barrier."""
    sort_for_team(layer, team)
    barrier(team)
    return is_sorted(layer)


@inner
def sorted_pairs(layer):  # type: ignore[no-untyped-def]
    """(starts [experts + 1], pairs [tokens * top_k]): expert e has pairs[starts[e] : starts[e + 1]]."""
    order = _order(layer)
    return order[: layer.experts + 1], order[2 * layer.experts + 1 : -2]


@inner
def active_experts(layer):  # type: ignore[no-untyped-def]
    """How many experts have pairs, and their ids, ascending."""
    order = _order(layer)
    return order[-2], order[layer.experts + 1 : 2 * layer.experts + 1]


@inner
def pairs_address(layer):  # type: ignore[no-untyped-def]
    """Where the sorted pairs begin."""
    return layer.order + (2 * layer.experts + 1) * 8

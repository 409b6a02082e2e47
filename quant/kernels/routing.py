"""Which tokens each expert of a layer works on: pairs (token, slot), sorted by expert."""

from typing import NamedTuple

from quant.kernels.jit import inner, shared
from quant.kernels.team import barrier
from quant.kernels.tiles import integers


class Layer(NamedTuple):
    """Addresses and sizes of one call. x, out: float32 [tokens, dim]; ids, weights: [tokens, top_k]."""

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


LAYER_FIELDS = len(Layer._fields)


@shared
def order_integers(tokens: int, top_k: int, experts: int) -> int:
    """int64 values that sorting needs: a start and a cursor for each expert, the sorted pairs, whether it was done."""
    return 2 * experts + 2 + tokens * top_k


@inner
def sort_pairs(layer):  # type: ignore[no-untyped-def]
    """Counting sort of the pairs by expert; False, with nothing read or written out of bounds, for a wrong id."""
    pairs = layer.tokens * layer.top_k
    ids = integers(layer.ids, (pairs,))
    order = integers(layer.order, (order_integers(layer.tokens, layer.top_k, layer.experts),))
    starts, cursors = order[: layer.experts + 1], order[layer.experts + 1 : 2 * layer.experts + 1]
    starts[:] = 0
    for pair in range(pairs):
        if ids[pair] < 0 or ids[pair] >= layer.experts:
            return False
        starts[ids[pair] + 1] += 1
    for expert in range(layer.experts):
        starts[expert + 1] += starts[expert]
        cursors[expert] = starts[expert]
    by_expert = order[2 * layer.experts + 1 : -1]
    for pair in range(pairs):
        by_expert[cursors[ids[pair]]] = pair
        cursors[ids[pair]] += 1
    return True


@inner
def sort_together(layer, team):  # type: ignore[no-untyped-def]
    """sort_pairs by one thread for all of a team, which goes on when that is done; whether it could be done."""
    done = integers(layer.order, (order_integers(layer.tokens, layer.top_k, layer.experts),))[-1:]
    if team.part == 0:
        done[0] = 1 if sort_pairs(layer) else 0
    barrier(team)
    return done[0] == 1


@inner
def sorted_pairs(layer):  # type: ignore[no-untyped-def]
    """(starts [experts + 1], pairs [tokens * top_k]): expert e has pairs[starts[e] : starts[e + 1]]."""
    order = integers(layer.order, (order_integers(layer.tokens, layer.top_k, layer.experts),))
    return order[: layer.experts + 1], order[2 * layer.experts + 1 : -1]

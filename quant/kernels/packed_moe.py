"""The routed experts of one layer in one call, from packed weights.

(token, slot) pairs are sorted by expert, so each touched expert's weights are read once:
    1. every token's x is quantised;
    2. hidden[p] = silu(w1 x) * (w3 x) for each pair p, quantised at once in groups of 32; threads share out these
       groups of rows of w1 and w3, over all touched experts;
    3. out[t] += weight[p] * (w2 hidden[p]), threads sharing out the columns of out.
The sum over a token's experts runs in ascending order of expert id (equal ids: in order of slot), whatever the slots.
"""

from numba import prange

from quant.kernels.activations import (
    ACTIVATION_BLOCK,
    BLOCK_GROUPS,
    GROUP,
    activation_bytes,
    k_blocks,
    quantise_group,
    quantise_share,
)
from quant.kernels.jit import Kernel, inner, shared
from quant.kernels.packed_dot import block_bytes, offset_of_code, packed_tile
from quant.kernels.packed_linear import SERIAL_VALUES, TILES_TOGETHER
from quant.kernels.routing import Layer, sort_pairs, sorted_pairs
from quant.kernels.silu import silu_times
from quant.kernels.tiles import floats, integers, share, strided_inputs
from quant.kernels.vector import TOKEN_TILE
from quant.packed import TILE_ROWS

TABLE_COLUMNS = 3  # addresses of w1, w3, w2
GROUP_TILES = GROUP // TILE_ROWS  # tiles of w1 and of w3 that give one group of hidden
GROUP_FLOATS = TOKEN_TILE * GROUP
SIGNATURE = "int64(" + ", ".join(["int64"] * 14) + ")"


@shared
def scratch_floats(tokens: int, top_k: int, dim: int, inter: int, parts: int) -> int:
    """float32 values of scratch: x and hidden (a row a pair), quantised; for each thread one group of gates and ups."""
    quantised = tokens * activation_bytes(dim) + tokens * top_k * activation_bytes(inter)
    return quantised // 4 + parts * 2 * GROUP_FLOATS


@inner
def _part_scratch(layer, part):  # type: ignore[no-untyped-def]
    return layer.scratch + 4 * scratch_floats(layer.tokens, layer.top_k, layer.dim, layer.inter, part)


@inner
def _hidden(layer, index):  # type: ignore[no-untyped-def]
    """Address of the quantised hidden row of a pair, by its place among the sorted pairs."""
    return layer.scratch + layer.tokens * activation_bytes(layer.dim) + index * activation_bytes(layer.inter)


@inner
def _token_input(layer, pairs, index, last):  # type: ignore[no-untyped-def]
    return layer.scratch + pairs[min(index, last)] // layer.top_k * activation_bytes(layer.dim)


@inner
def _quantise(layer, part, parts):  # type: ignore[no-untyped-def]
    offset = offset_of_code(layer.code)
    return quantise_share(layer.x, layer.tokens, layer.dim, offset, layer.scratch, part, parts)


@inner
def _gate_up_tiles(layer, addresses, group, count, inputs, results):  # type: ignore[no-untyped-def]
    """One group of 32 rows of w1 and w3: float32 [TOKEN_TILE, 32] each at `results`."""
    blocks = k_blocks(layer.dim)
    tile_bytes = blocks * block_bytes(layer.code)
    for half in range(GROUP_TILES):
        tile = group * GROUP_TILES + half
        if tile * TILE_ROWS < layer.inter:
            for matrix in range(2):
                address = addresses[matrix] + tile * tile_bytes
                result = results + (matrix * GROUP_FLOATS + half * TILE_ROWS) * 4
                packed_tile(layer.code, address, count, inputs, blocks, result, GROUP * 4)


@inner
def _store_hidden(layer, index, group, values):  # type: ignore[no-untyped-def]
    """Quantise one group of a pair's hidden values, float32 [32]; the last group fills up its block, too."""
    end = group + 1
    if end * GROUP >= layer.inter:
        end = k_blocks(layer.inter) * BLOCK_GROUPS
    for number in range(group, end):
        block = _hidden(layer, index) + number // BLOCK_GROUPS * ACTIVATION_BLOCK
        left = layer.inter - number * GROUP
        quantise_group(values, left, offset_of_code(layer.code), block, number % BLOCK_GROUPS)


@inner
def _gate_up_group(layer, expert, pairs, group, results):  # type: ignore[no-untyped-def]
    """hidden[pair, 32 group : 32 group + 32] for all pairs of one expert."""
    start, end, by_expert = pairs
    table = integers(layer.table, (layer.experts, TABLE_COLUMNS))
    gates = floats(results, (GROUP_FLOATS,))
    ups = floats(results + GROUP_FLOATS * 4, (GROUP_FLOATS,))
    for first in range(start, end, TOKEN_TILE):
        count = min(TOKEN_TILE, end - first)
        inputs = (
            _token_input(layer, by_expert, first, end - 1),
            _token_input(layer, by_expert, first + 1, end - 1),
            _token_input(layer, by_expert, first + 2, end - 1),
            _token_input(layer, by_expert, first + 3, end - 1),
        )
        _gate_up_tiles(layer, (table[expert, 0], table[expert, 1]), group, count, inputs, results)
        silu_times(gates, ups)
        for t in range(count):
            _store_hidden(layer, first + t, group, results + t * GROUP * 4)


@inner
def _steps(starts, expert):  # type: ignore[no-untyped-def]
    """How often an expert's rows are multiplied: once for each 4 tokens."""
    return (starts[expert + 1] - starts[expert] + TOKEN_TILE - 1) // TOKEN_TILE


@inner
def _gate_up(layer, part, parts):  # type: ignore[no-untyped-def]
    """Step 2 for one thread's groups of rows; 1 when done.

    The groups of all experts follow each other, each as long as its number of steps; a thread takes those that begin
    in its part of the whole length.
    """
    starts, by_expert = sorted_pairs(layer)
    groups = (layer.inter + GROUP - 1) // GROUP
    length = 0
    for expert in range(layer.experts):
        length += groups * _steps(starts, expert)
    begin, end = share(length, part, parts)
    position = 0
    for expert in range(layer.experts):
        steps = _steps(starts, expert)
        if steps == 0:
            continue
        pairs = (starts[expert], starts[expert + 1], by_expert)
        first_group = min(groups, max(0, (begin - position + steps - 1) // steps))
        end_group = min(groups, max(0, (end - position + steps - 1) // steps))
        for group in range(first_group, end_group):
            _gate_up_group(layer, expert, pairs, group, _part_scratch(layer, part))
        position += groups * steps
    return 1


@inner
def _down_tile(layer, tile, address, pairs, first, result):  # type: ignore[no-untyped-def]
    """out[token, 16 tile : 16 tile + 16] += weight * (w2 hidden) for up to 4 pairs of one expert."""
    end, by_expert = pairs
    count = min(TOKEN_TILE, end - first)
    weights = floats(layer.weights, (layer.tokens * layer.top_k,))
    inputs = strided_inputs(_hidden(layer, first), activation_bytes(layer.inter), count)
    packed_tile(layer.code, address, count, inputs, k_blocks(layer.inter), result, TILE_ROWS * 4)
    values = floats(result, (TOKEN_TILE, TILE_ROWS))
    for t in range(count):
        pair = by_expert[first + t]
        out = floats(layer.out + (pair // layer.top_k * layer.dim + tile * TILE_ROWS) * 4, (TILE_ROWS,))
        for r in range(min(TILE_ROWS, layer.dim - tile * TILE_ROWS)):
            out[r] += weights[pair] * values[t, r]


@inner
def _down(layer, part, parts):  # type: ignore[no-untyped-def]
    """Step 3 for one thread's columns of out."""
    starts, by_expert = sorted_pairs(layer)
    table = integers(layer.table, (layer.experts, TABLE_COLUMNS))
    tile_bytes = k_blocks(layer.inter) * block_bytes(layer.code)
    first_tile, end_tile = share((layer.dim + TILE_ROWS - 1) // TILE_ROWS, part, parts)
    floats(layer.out, (layer.tokens, layer.dim))[:, first_tile * TILE_ROWS : end_tile * TILE_ROWS] = 0
    for expert in range(layer.experts):
        for tiles in range(first_tile, end_tile, TILES_TOGETHER):
            for first in range(starts[expert], starts[expert + 1], TOKEN_TILE):
                for tile in range(tiles, min(tiles + TILES_TOGETHER, end_tile)):
                    address = table[expert, 2] + tile * tile_bytes
                    pairs = (starts[expert + 1], by_expert)
                    _down_tile(layer, tile, address, pairs, first, _part_scratch(layer, part))


def _packed_moe(x, ids, weights, table, out, order, scratch, tokens, top_k, experts, dim, inter, code, parts):  # type: ignore[no-untyped-def]
    """One layer; the arguments are the fields of Layer. 1 when done, 0 if an id is not in 0 .. experts - 1."""
    layer = Layer(x, ids, weights, table, out, order, scratch, tokens, top_k, experts, dim, inter, code)
    if not sort_pairs(layer):
        return 0
    if parts == 1:
        _quantise(layer, 0, 1)
        _gate_up(layer, 0, 1)
        _down(layer, 0, 1)
        return 1
    done = 0  # keeps Numba from fusing the loops (moe.py)
    if tokens * dim < SERIAL_VALUES:
        done = parts * _quantise(layer, 0, 1)
    else:
        for part in prange(parts):
            done += _quantise(layer, part, parts)
    if done < parts:
        return 0
    for part in prange(parts):
        done += _gate_up(layer, part, parts)
    if done < 2 * parts:
        return 0
    for part in prange(parts):
        _down(layer, part, parts)
    return 1


packed_moe_experts = Kernel(_packed_moe, SIGNATURE)

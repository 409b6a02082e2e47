"""The routed experts of one layer in one call, from packed weights.

Threads go through these steps together, with a barrier after each:
    1. route: (token, slot) pairs are sorted by expert, so that each touched expert's weights are read once; every
       token's x is quantised, and where tiles are used laid out once a pair, in that order;
    2. gate and up: hidden[p] = silu(w1 x) * (w3 x) for each pair p, quantised as soon as 128 values are there;
    3. down: out[t] += weight[p] * (w2 hidden[p]).
In step 2 a thread takes rows of an expert, in step 3 columns of out for all experts, as long as there are any: so all
are done at about the same time, however many tokens an expert has. The sum over a token's experts runs in ascending
order of expert id (equal ids: in order of slot), whatever the slots and the threads.

w2 may have another format than w1 and w3: it decides how hidden values are quantised.

With NUMA nodes, each holds a share of every matrix's rows, and its threads compute those.
"""

from quant.kernels.activations import (
    copy_row,
    input_bytes,
    inputs_at,
    k_blocks,
    quantise,
)
from quant.kernels.atomics import add_word, arguments_of
from quant.kernels.jit import Kernel, inner, shared
from quant.kernels.packed_dot import SLOTS
from quant.kernels.packed_linear import padded_rows, unit_tiles
from quant.kernels.packed_rows import HALF, RESULTS, TABLE_BYTES, Rows, multiply_rows, set_tiles, tile_bytes
from quant.kernels.packed_tiles import SCRATCH_BYTES, uses_tiles
from quant.kernels.routing import (
    LAYER_FIELDS,
    Layer,
    active_experts,
    is_sorted,
    pairs_address,
    sort_for_team,
    sorted_pairs,
)
from quant.kernels.silu import silu_lanes
from quant.kernels.team import COUNTER_COUNT, Team, barrier, take
from quant.kernels.tile_steps import TOKENS
from quant.kernels.tile_unit import use_tile_unit
from quant.kernels.tiles import floats, integers, share
from quant.kernels.vector import prefetch_line
from quant.packed import BLOCK_K, LINE, TILE_ROWS

TABLE_COLUMNS = 3  # addresses of w1, w3, w2
BLOCK_TILES = BLOCK_K // TILE_ROWS  # tiles of w1 and of w3 that give one block of hidden
FEW_PAIRS = 64  # up to here a unit of step 2 is four tiles of w1 and w3, beyond a block's 8
COLUMN_UNITS = 8  # units of step 3 that each thread gets, if there are enough columns
OUT_AHEAD = 4  # rows of results between one that is added to and its prefetch
MOST_TABLES = 4  # of 8 tiles in a unit of step 3
GATE_UP, DOWN = 0, 1  # counters of the team, two for each node
MOST_NODES = COUNTER_COUNT // 2


@shared
def lines(nbytes: int) -> int:
    """Whole cache lines."""
    return (nbytes + 63) // 64 * 64


@shared
def part_bytes(tokens: int) -> int:
    """Scratch of one thread: results of 8 tiles, a block of hidden values, a table of tiles, and what tiles need."""
    return padded_rows(tokens) * (RESULTS + BLOCK_K) * 4 + TABLE_BYTES + SCRATCH_BYTES


@shared
def few(tokens: int, top_k: int) -> int:
    """Pairs for which hidden values are kept until their block is whole."""
    return min(tokens * top_k, FEW_PAIRS)


@shared
def scratch_bytes(tokens: int, top_k: int, dim: int, inter: int, parts: int) -> int:
    """Scratch: quantised x, of tokens and (for tiles) of pairs, quantised hidden; hidden values and counts of few
    pairs; each thread's own."""
    pairs = tokens * top_k + TOKENS
    quantised = lines(input_bytes(tokens, dim)) + lines(input_bytes(pairs, dim)) + lines(input_bytes(pairs, inter))
    kept = few(tokens, top_k) * k_blocks(inter) * (BLOCK_K + 1) * 4
    return quantised + lines(kept) + parts * part_bytes(tokens)


@shared
def scratch_floats(tokens: int, top_k: int, dim: int, inter: int, parts: int) -> int:
    """The same in float32 values."""
    return scratch_bytes(tokens, top_k, dim, inter, parts) // 4


@inner
def _token_inputs(layer):  # type: ignore[no-untyped-def]
    return inputs_at(layer.scratch, layer.tokens, layer.dim, layer.code)


@inner
def _pair_inputs(layer):  # type: ignore[no-untyped-def]
    """x in the order of the sorted pairs."""
    address = layer.scratch + lines(input_bytes(layer.tokens, layer.dim))
    return inputs_at(address, layer.tokens * layer.top_k + TOKENS, layer.dim, layer.code)


@inner
def _hidden(layer):  # type: ignore[no-untyped-def]
    """Hidden values in the order of the sorted pairs."""
    pairs = layer.tokens * layer.top_k + TOKENS
    address = _pair_inputs(layer).records + lines(input_bytes(pairs, layer.dim))
    return inputs_at(address, pairs, layer.inter, layer.down_code)


@inner
def _kept(layer):  # type: ignore[no-untyped-def]
    """Address of the hidden values, float32 [few pairs, blocks of inter, 128]; behind it int32 [few, blocks] counts."""
    hidden = _hidden(layer)
    return hidden.records + lines(input_bytes(hidden.rows, layer.inter))


@inner
def _own(layer, team):  # type: ignore[no-untyped-def]
    """A thread's own scratch."""
    return layer.scratch + scratch_bytes(layer.tokens, layer.top_k, layer.dim, layer.inter, team.part)


@inner
def _by_pair(layer):  # type: ignore[no-untyped-def]
    """Whether x is laid out once a pair: where some expert may use tiles."""
    return uses_tiles(layer.granted, layer.tokens)


@inner
def _is_few(layer):  # type: ignore[no-untyped-def]
    return layer.tokens * layer.top_k <= FEW_PAIRS


@inner
def _quantise_tokens(layer, team):  # type: ignore[no-untyped-def]
    blocks, inputs = k_blocks(layer.dim), _token_inputs(layer)
    first, end = share(layer.tokens * blocks, team.part, team.parts)
    for number in range(first, end):
        row, block = number // blocks, number % blocks
        x = layer.x + (row * layer.dim + block * BLOCK_K) * 4
        quantise(inputs, row, block, x, layer.dim - block * BLOCK_K)


@inner
def _spread_tokens(layer, team):  # type: ignore[no-untyped-def]
    """One thread's share of the sorted pairs gets its tokens' quantised x."""
    source, target = _token_inputs(layer), _pair_inputs(layer)
    _, by_expert = sorted_pairs(layer)
    first, end = share(layer.tokens * layer.top_k, team.part, team.parts)
    for index in range(first, end):
        copy_row(source, by_expert[index] // layer.top_k, target, index)


@inner
def _clear_counts(layer):  # type: ignore[no-untyped-def]
    pairs, blocks = few(layer.tokens, layer.top_k), k_blocks(layer.inter)
    floats(_kept(layer) + pairs * blocks * BLOCK_K * 4, (pairs * blocks,))[:] = 0


@inner
def _route(layer, team):  # type: ignore[no-untyped-def]
    """Step 1; False for a wrong id, with nothing read or written out of bounds."""
    sort_for_team(layer, team)
    if team.part == 0:
        _clear_counts(layer)
    _quantise_tokens(layer, team)
    barrier(team)
    if not is_sorted(layer):
        return False
    if _by_pair(layer):
        _spread_tokens(layer, team)
        barrier(team)
    return True


@inner
def _gate_up_rows(layer, start, end):  # type: ignore[no-untyped-def]
    """Which inputs an expert's pairs, from `start` to `end` among the sorted ones, have."""
    if _by_pair(layer):
        return Rows(start, end - start, 0, 1)
    return Rows(start, end - start, pairs_address(layer), layer.top_k)


@inner
def _gate_up_inputs(layer):  # type: ignore[no-untyped-def]
    return _pair_inputs(layer) if _by_pair(layer) else _token_inputs(layer)


@inner
def _tile_table(layer, team):  # type: ignore[no-untyped-def]
    """A thread's table of tiles; behind it is what tiles need."""
    return _own(layer, team) + padded_rows(layer.tokens) * (RESULTS + BLOCK_K) * 4


@inner
def _gate_up_tiles(layer, team, rows, tile, place):  # type: ignore[no-untyped-def]
    """hidden[:, 16 tile : 16 tile + 64] of one expert's pairs, from the tiles of w1 and w3 in the thread's table.

    place: address of the first row's values, and bytes from row to row.
    """
    results, table = _own(layer, team), _tile_table(layer, team)
    multiply_rows(_gate_up_inputs(layer), rows, table, layer.granted, results, table + TABLE_BYTES)
    tiles = min(HALF, (layer.inter + TILE_ROWS - 1) // TILE_ROWS - tile)
    for row in range(rows.size):
        gates, target = results + row * RESULTS * 4, place[0] + row * place[1]
        for number in range(tiles):
            offset = number * TILE_ROWS * 4
            silu_lanes(gates + offset, gates + HALF * TILE_ROWS * 4 + offset, target + offset)


@inner
def _quantise_hidden(layer, rows, block, place):  # type: ignore[no-untyped-def]
    hidden = _hidden(layer)
    for row in range(rows.size):
        quantise(hidden, rows.first + row, block, place[0] + row * place[1], layer.inter - block * BLOCK_K)


@inner
def _count_unit(layer, rows, block, units):  # type: ignore[no-untyped-def]
    """Whether this was the last of the `units` units of an expert's block of hidden."""
    pairs, blocks = few(layer.tokens, layer.top_k), k_blocks(layer.inter)
    counts = _kept(layer) + pairs * blocks * BLOCK_K * 4
    return add_word(counts + (rows.first * blocks + block) * 4, 1) == units - 1


@inner
def _hidden_place(layer, team, rows, block):  # type: ignore[no-untyped-def]
    """Where a block's hidden values are gathered: address of the first row's, and bytes from row to row."""
    if _is_few(layer):
        stride = k_blocks(layer.inter) * BLOCK_K * 4
        return _kept(layer) + rows.first * stride + block * BLOCK_K * 4, stride
    return _own(layer, team) + padded_rows(layer.tokens) * RESULTS * 4, BLOCK_K * 4


@inner
def _unit(layer, node, number):  # type: ignore[no-untyped-def]
    """Unit `number` of step 2 on a node: expert, first tile of w1 and w3, end; expert -1 beyond the last."""
    tiles = (layer.inter + TILE_ROWS - 1) // TILE_ROWS
    first_block, end_block = share(k_blocks(layer.inter), node, layer.nodes)
    first, end = first_block * BLOCK_TILES, min(end_block * BLOCK_TILES, tiles)
    each = HALF if _is_few(layer) else BLOCK_TILES
    units = (end - first + each - 1) // each
    count, experts = active_experts(layer)
    if units == 0 or number >= count * units:
        return -1, 0, 0
    tile = first + number % units * each
    return experts[number // units], tile, min(tile + each, end)


@inner
def _set_gate_up(layer, team, node, unit, then):  # type: ignore[no-untyped-def]
    """Four tiles of w1 and of w3 into the thread's table. unit, then: expert, first tile, end."""
    addresses = integers(layer.table, (layer.nodes * layer.experts, TABLE_COLUMNS))
    row, later = node * layer.experts + unit[0], node * layer.experts + then[0]
    table, size = _tile_table(layer, team), tile_bytes(_gate_up_inputs(layer))
    for matrix in range(2):
        following = addresses[later, matrix] + then[1] * size
        set_tiles(table, matrix * HALF, addresses[row, matrix], unit[1], unit[2], following, size)


@inner
def _gate_up_rows_of_unit(layer, team, node, unit, following, rows):  # type: ignore[no-untyped-def]
    """A unit of step 2 for some of its expert's pairs, no more than there are tokens."""
    expert, first, end = unit
    block = first // BLOCK_TILES
    place = _hidden_place(layer, team, rows, block)
    for tile in range(first, end, HALF):
        then = (expert, tile + HALF, end) if tile + HALF < end else following
        _set_gate_up(layer, team, node, (expert, tile, end), then if then[0] >= 0 else unit)
        column = (tile - block * BLOCK_TILES) * TILE_ROWS * 4
        _gate_up_tiles(layer, team, rows, tile, (place[0] + column, place[1]))
    if not _is_few(layer):
        _quantise_hidden(layer, rows, block, place)


@inner
def _gate_up_unit(layer, team, node, unit, following):  # type: ignore[no-untyped-def]
    """A unit of step 2. following: the unit that this thread takes next."""
    starts, _ = sorted_pairs(layer)
    start, end = starts[unit[0]], starts[unit[0] + 1]
    for first in range(start, end, layer.tokens):  # more only if a token has an expert twice
        rows = _gate_up_rows(layer, first, min(first + layer.tokens, end))
        _gate_up_rows_of_unit(layer, team, node, unit, following, rows)
    if _is_few(layer):
        block, rows = unit[1] // BLOCK_TILES, _gate_up_rows(layer, start, end)
        tiles = min(BLOCK_TILES, (layer.inter + TILE_ROWS - 1) // TILE_ROWS - block * BLOCK_TILES)
        if _count_unit(layer, rows, block, (tiles + HALF - 1) // HALF):
            _quantise_hidden(layer, rows, block, _hidden_place(layer, team, rows, block))


@inner
def _gate_up(layer, team, node):  # type: ignore[no-untyped-def]
    """Step 2 for what one thread takes of a node's rows."""
    unit = _unit(layer, node, take(team, GATE_UP + 2 * node, 1))
    while unit[0] >= 0:
        following = _unit(layer, node, take(team, GATE_UP + 2 * node, 1))
        _gate_up_unit(layer, team, node, unit, following)
        unit = following


@inner
def _add_down(layer, results, start, count, columns):  # type: ignore[no-untyped-def]
    """out[token, columns] += weight * results, for `count` sorted pairs from `start` on. columns: first and end."""
    _, by_expert = sorted_pairs(layer)
    weights = floats(layer.weights, (layer.tokens * layer.top_k,))
    width = columns[1] - columns[0]
    for row in range(count):
        later = by_expert[start + min(row + OUT_AHEAD, count - 1)] // layer.top_k
        for line in range(0, width * 4, LINE):
            prefetch_line(layer.out + (later * layer.dim + columns[0]) * 4 + line)
        pair = by_expert[start + row]
        values = floats(results + row * RESULTS * 4, (width,))
        out = floats(layer.out + (pair // layer.top_k * layer.dim + columns[0]) * 4, (width,))
        weight = weights[pair]
        for column in range(width):
            out[column] += weight * values[column]


@inner
def _column_unit(layer, team, node, number):  # type: ignore[no-untyped-def]
    """Unit `number` of step 3 on a node: its first tile of w2 and the end; empty beyond the last."""
    first, end = share((layer.dim + TILE_ROWS - 1) // TILE_ROWS, node, layer.nodes)
    units = COLUMN_UNITS * team.parts
    each = unit_tiles((end - first) * layer.nodes, units)
    if each == SLOTS and not _is_few(layer):  # several tables for each reading of an expert's hidden values
        each = max(1, min(MOST_TABLES, (end - first) * layer.nodes // (units * SLOTS))) * SLOTS
    return min(first + number * each, end), min(first + (number + 1) * each, end)


@inner
def _down_expert(layer, team, node, expert, unit, then):  # type: ignore[no-untyped-def]
    """One expert's part of a unit of columns. then: expert and first tile of what is read after it."""
    addresses = integers(layer.table, (layer.nodes * layer.experts, TABLE_COLUMNS))
    results, table, size = _own(layer, team), _tile_table(layer, team), tile_bytes(_hidden(layer))
    matrix = addresses[node * layer.experts + expert, 2]
    following = addresses[node * layer.experts + then[0], 2] + then[1] * size
    starts, _ = sorted_pairs(layer)
    for tile in range(unit[0], unit[1], SLOTS):
        end = min(tile + SLOTS, unit[1])
        later = matrix + end * size if end < unit[1] else following
        for half in range(2):
            set_tiles(table, half * HALF, matrix, tile + half * HALF, end, later + half * HALF * size, size)
        columns = tile * TILE_ROWS, min(end * TILE_ROWS, layer.dim)
        for first in range(starts[expert], starts[expert + 1], layer.tokens):
            rows = Rows(first, min(layer.tokens, starts[expert + 1] - first), 0, 1)
            multiply_rows(_hidden(layer), rows, table, layer.granted, results, table + TABLE_BYTES)
            _add_down(layer, results, rows.first, rows.size, columns)


@inner
def _down_unit(layer, team, node, unit, following):  # type: ignore[no-untyped-def]
    """All experts' part of a unit of columns."""
    first, end = unit[0] * TILE_ROWS, min(unit[1] * TILE_ROWS, layer.dim)
    floats(layer.out, (layer.tokens, layer.dim))[:, first:end] = 0
    count, experts = active_experts(layer)
    for number in range(count):
        expert = experts[number]
        if number + 1 < count:
            then = (experts[number + 1], unit[0])
        elif following[0] < following[1]:
            then = (experts[0], following[0])
        else:
            then = (expert, unit[0])
        _down_expert(layer, team, node, expert, unit, then)


@inner
def _down(layer, team, node):  # type: ignore[no-untyped-def]
    """Step 3 for what one thread takes of a node's columns."""
    unit = _column_unit(layer, team, node, take(team, DOWN + 2 * node, 1))
    while unit[0] < unit[1]:
        following = _column_unit(layer, team, node, take(team, DOWN + 2 * node, 1))
        _down_unit(layer, team, node, unit, following)
        unit = following


@inner
def _nodes_of(layer, team):  # type: ignore[no-untyped-def]
    """The nodes whose rows a thread computes: its own, or several where there are fewer threads than nodes."""
    if team.parts < layer.nodes:
        return share(layer.nodes, team.part, team.parts)
    node = team.part * layer.nodes // team.parts
    return node, node + 1


def _packed_moe(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """One layer; the arguments are the fields of Layer. Part 0 returns 1, or 0 if an id is out of range."""
    layer, team = Layer(*arguments_of(arguments, LAYER_FIELDS)), Team(part, parts, sync)
    if not _route(layer, team):
        return 0
    first, end = _nodes_of(layer, team)
    use_tile_unit(layer.granted, layer.tokens, True)
    for node in range(first, end):
        _gate_up(layer, team, node)
    barrier(team)
    for node in range(first, end):
        _down(layer, team, node)
    use_tile_unit(layer.granted, layer.tokens, False)
    return 1 if part == 0 else 0


packed_moe_experts = Kernel(_packed_moe)

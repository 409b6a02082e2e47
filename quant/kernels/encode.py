"""Weights into packed blocks: what quant/encode_reference.py does, with the same bytes, 16 rows at a time.

A tile's rows are the lanes of `Lanes`. One block of 16 rows by 128 columns is worked on at a time, transposed, so that
a column is one load; it is searched and written out before the next one is read.
"""

from functools import cache

import numba
import numpy as np
from numpy.typing import NDArray

from quant.encode_reference import (
    ANCHORS,
    LARGEST_INTEGER,
    LARGEST_POWER,
    NEGLIGIBLE,
    SMALLEST_INTEGER,
    SMALLEST_POWER,
    TOP_INTEGERS,
    largest_scale,
    level_range,
    midpoints,
)
from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner
from quant.kernels.lanes import (
    fill,
    load,
    magnitude,
    nearest_bf16,
    power_below,
    store,
    store_bf16,
    store_bytes,
    where_less,
)
from quant.kernels.tiles import floats, share
from quant.kernels.vector import pointer
from quant.packed import BLOCK_K, HEADER_BYTES, TILE_ROWS, PackedFormat

VECTOR = 4 * TILE_ROWS  # bytes of one float32 a row
MOST_GROUPS = 8  # in a block's row
# Scratch of one thread, in bytes from its start: the block's columns, two vectors a group, codes, integers.
FITTED = BLOCK_K * VECTOR
SQUARES = FITTED + MOST_GROUPS * VECTOR
CODES = SQUARES + MOST_GROUPS * VECTOR
INTEGERS = CODES + BLOCK_K * TILE_ROWS
SCRATCH_BYTES = INTEGERS + MOST_GROUPS * TILE_ROWS

# What the search needs to know of a format: a table of float32, these first. Evenly spaced levels are a range, others
# are listed, with the midpoints between them.
LOWEST, HIGHEST, CODE_OF_ZERO, LARGEST_SCALE, MIDPOINTS = 0, 1, 2, 3, 4
LEVELS = MIDPOINTS + 15
TOPS = LEVELS + 16
FIRST_ANCHOR = TOPS + len(TOP_INTEGERS)
TABLE_SIZE = FIRST_ANCHOR + max(map(len, ANCHORS.values()))

ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
ROUNDING = np.float32(1.5 * 2**23)  # float32 this large have no fraction: adding it rounds, halves to even


@cache
def search_table(fmt: PackedFormat) -> NDArray[np.float32]:
    """The numbers that steer the search for `fmt`."""
    table = np.zeros(TABLE_SIZE, np.float32)
    table[LOWEST], table[HIGHEST] = level_range(fmt)
    table[CODE_OF_ZERO], table[LARGEST_SCALE] = fmt.zero, largest_scale(fmt)
    if fmt.levels is not None:
        table[MIDPOINTS:LEVELS], table[LEVELS:TOPS] = midpoints(fmt), fmt.levels
    table[TOPS:FIRST_ANCHOR] = TOP_INTEGERS
    anchors = ANCHORS[fmt.name]
    table[FIRST_ANCHOR : FIRST_ANCHOR + len(anchors)] = anchors
    return table


@inner
def _bytes(address, shape):  # type: ignore[no-untyped-def]
    return numba.carray(pointer(address), shape, np.uint8)


@inner
def _clip(value, lowest, highest):  # type: ignore[no-untyped-def]
    low, high = fill(lowest), fill(highest)
    raised = where_less(value, low, low, value)
    return where_less(high, raised, high, raised)


@inner
def _rint(value):  # type: ignore[no-untyped-def]
    """Below 2^22 in magnitude."""
    return value + fill(ROUNDING) - fill(ROUNDING)


@inner
def _over(numerator, divisor):  # type: ignore[no-untyped-def]
    """numerator / divisor, and 0 where the divisor is 0."""
    zero = fill(ZERO)
    is_some = magnitude(divisor)
    return where_less(zero, is_some, numerator / divisor, zero)


@inner
def _even_level(scaled, table):  # type: ignore[no-untyped-def]
    return _rint(_clip(scaled, table[LOWEST], table[HIGHEST]))


@inner
def _even_code(scaled, table):  # type: ignore[no-untyped-def]
    return _even_level(scaled, table) + fill(table[CODE_OF_ZERO])


@inner
def _listed_level(scaled, table):  # type: ignore[no-untyped-def]
    level = fill(table[LEVELS])
    for i in range(15):
        level = where_less(fill(table[MIDPOINTS + i]), scaled, fill(table[LEVELS + 1 + i]), level)
    return level


@inner
def _listed_code(scaled, table):  # type: ignore[no-untyped-def]
    code = fill(ZERO)
    for i in range(15):
        code = where_less(fill(table[MIDPOINTS + i]), scaled, code + fill(ONE), code)
    return code


def _make_fit(nearest_level):  # type: ignore[no-untyped-def]
    @inner
    def fit(x, group, inverse, table):  # type: ignore[no-untyped-def]
        """Σ level × x and Σ level² (at least 1) of one group, whose first column is at address x."""
        products, squares, one = fill(ZERO), fill(ZERO), fill(ONE)
        for k in range(group):
            value = load(x + k * VECTOR)
            level = nearest_level(value * inverse, table)
            products = products + level * value
            squares = squares + level * level
        return products, where_less(squares, one, one, squares)

    return fit


def _make_put_codes(nearest_code):  # type: ignore[no-untyped-def]
    @inner
    def put_codes(x, group, inverse, table, codes):  # type: ignore[no-untyped-def]
        for k in range(group):
            store_bytes(codes + k * TILE_ROWS, nearest_code(load(x + k * VECTOR) * inverse, table))

    return put_codes


_fit_even, _fit_listed = _make_fit(_even_level), _make_fit(_listed_level)
_put_even_codes, _put_listed_codes = _make_put_codes(_even_code), _make_put_codes(_listed_code)


@inner
def _error(x, group, scale, table):  # type: ignore[no-untyped-def]
    """Σ (x - level × scale)², with the nearest of evenly spaced levels."""
    inverse, total = _over(fill(ONE), scale), fill(ZERO)
    for k in range(group):
        value = load(x + k * VECTOR)
        off = value - _even_level(value * inverse, table) * scale
        total = total + off * off
    return total


@inner
def _peak(x, group):  # type: ignore[no-untyped-def]
    """The group's value of largest magnitude, the first of equals; 0 where it is negligible."""
    peak, most = fill(ZERO), fill(ZERO)
    for k in range(group):
        value = load(x + k * VECTOR)
        size = magnitude(value)
        peak, most = where_less(most, size, value, peak), where_less(most, size, size, most)
    return where_less(most, fill(NEGLIGIBLE), fill(ZERO), peak)


@inner
def _normalise(x):  # type: ignore[no-untyped-def]
    """Divide the block's rows by powers of two; returned."""
    most = fill(ZERO)
    for k in range(BLOCK_K):
        size = magnitude(load(x + k * VECTOR))
        most = where_less(most, size, size, most)
    power = _clip(power_below(most), SMALLEST_POWER, LARGEST_POWER)
    factor = fill(ONE) / power
    for k in range(BLOCK_K):
        store(x + k * VECTOR, load(x + k * VECTOR) * factor)
    return power


@inner
def _stored(scale, power, table):  # type: ignore[no-untyped-def]
    """A scale times its row's power of two, as a bfloat16 holds it; -0 becomes 0."""
    largest = table[LARGEST_SCALE]
    return nearest_bf16(_clip(scale * power, -largest, largest)) + fill(ZERO)


@inner
def _encode_groups(x, group, power, table, anchors, header):  # type: ignore[no-untyped-def]
    """The codes of a block and, at address `header`, its bfloat16 scales."""
    for g in range(BLOCK_K // group):
        values = x + g * group * VECTOR
        peak = _peak(values, group)
        best, least = fill(ZERO), fill(INFINITY)
        for a in range(anchors):
            inverse = _over(fill(table[FIRST_ANCHOR + a]), peak)
            products, squares = _fit_even(values, group, inverse, table)
            stored = _stored(products / squares, power, table)
            error = _error(values, group, stored * (fill(ONE) / power), table)
            best, least = where_less(error, least, stored, best), where_less(error, least, error, least)
        store_bf16(header + g * 2 * TILE_ROWS, best)
        inverse = _over(fill(ONE), best * (fill(ONE) / power))
        _put_even_codes(values, group, inverse, table, x + CODES + g * group * TILE_ROWS)


@inner
def _real_scale(x, group, table, anchors, fitted, squares):  # type: ignore[no-untyped-def]
    """The best scale of a group before it is rounded, to `fitted`, and Σ level², to `squares`."""
    peak = _peak(x, group)
    best, curvature, most = fill(ZERO), fill(ZERO), fill(-ONE)
    for a in range(anchors):
        inverse = _over(fill(table[FIRST_ANCHOR + a]), peak)
        products, growth = _fit_listed(x, group, inverse, table)
        scale = products / growth
        gain = scale * products
        best, curvature = where_less(most, gain, scale, best), where_less(most, gain, growth, curvature)
        most = where_less(most, gain, gain, most)
    store(fitted, where_less(fill(ZERO), magnitude(peak), best, fill(ZERO)))
    store(squares, curvature)


@inner
def _nearest_integer(scale, d):  # type: ignore[no-untyped-def]
    return _rint(_clip(scale * _over(fill(ONE), d), SMALLEST_INTEGER, LARGEST_INTEGER))


@inner
def _block_scale(x, groups, power, table):  # type: ignore[no-untyped-def]
    """The bfloat16 whose multiples are nearest to the groups' scales."""
    top = fill(ZERO)
    for g in range(groups):
        size = magnitude(load(x + FITTED + g * VECTOR))
        top = where_less(top, size, size, top)
    best, least = fill(ZERO), fill(INFINITY)
    for i in range(FIRST_ANCHOR - TOPS):
        stored = _stored(top / fill(table[TOPS + i]), power, table)
        d, cost = stored * (fill(ONE) / power), fill(ZERO)
        for g in range(groups):
            scale = load(x + FITTED + g * VECTOR)
            off = _nearest_integer(scale, d) * d - scale
            cost = cost + load(x + SQUARES + g * VECTOR) * off * off
        best, least = where_less(cost, least, stored, best), where_less(cost, least, cost, least)
    return best


@inner
def _encode_two_scales(x, group, power, table, anchors, header):  # type: ignore[no-untyped-def]
    """The codes of a block and, at address `header`, its rows' bfloat16 and its groups' 6-bit integers."""
    groups = BLOCK_K // group
    for g in range(groups):
        vectors = x + g * VECTOR
        _real_scale(x + g * group * VECTOR, group, table, anchors, vectors + FITTED, vectors + SQUARES)
    stored = _block_scale(x, groups, power, table)
    store_bf16(header, stored)
    d = stored * (fill(ONE) / power)
    for g in range(groups):
        integer = _nearest_integer(load(x + FITTED + g * VECTOR), d)
        store_bytes(x + INTEGERS + g * TILE_ROWS, integer - fill(SMALLEST_INTEGER))
        inverse = _over(fill(ONE), integer * d)
        codes = x + CODES + g * group * TILE_ROWS
        _put_listed_codes(x + g * group * VECTOR, group, inverse, table, codes)
    _pack_integers(x + INTEGERS, header + 2 * TILE_ROWS)


@inner
def _pack_integers(source, target):  # type: ignore[no-untyped-def]
    """8 groups × 16 rows of 6-bit integers: first their upper 2 bits, then their lower 4."""
    integers, packed = _bytes(source, (8, TILE_ROWS)), _bytes(target, (6, TILE_ROWS))
    for r in range(TILE_ROWS):
        for half in range(2):
            high = 0
            for i in range(4):
                high |= integers[4 * half + i, r] >> 4 << 2 * i
            packed[half, r] = high
        for pair in range(4):
            packed[2 + pair, r] = integers[2 * pair, r] & 15 | (integers[2 * pair + 1, r] & 15) << 4


@inner
def _pack_codes(source, bits, target):  # type: ignore[no-untyped-def]
    """128 columns × 16 rows of codes, in lines of 64 bytes in which each row owns four."""
    codes = _bytes(source, (BLOCK_K // 4, 4, TILE_ROWS))
    lines = _bytes(target, (BLOCK_K * bits // 32, TILE_ROWS, 4))
    for line in range(len(lines)):
        for i in range(4):
            for r in range(TILE_ROWS):
                if bits == 8:
                    lines[line, r, i] = codes[line, i, r]
                else:
                    lines[line, r, i] = codes[2 * line, i, r] | codes[2 * line + 1, i, r] << 4


@inner
def _open_block(weight, rows, columns, k, x):  # type: ignore[no-untyped-def]
    """Copy a block, whose rows are `k` apart, to address x: column by column, filled up with zeros."""
    block = floats(x, (BLOCK_K, TILE_ROWS))
    if rows < TILE_ROWS or columns < BLOCK_K:
        block[:] = ZERO
    for r in range(rows):
        row = floats(weight + r * k * 4, (columns,))
        for column in range(columns):
            block[column, r] = row[column]


@inner
def _part(weight, rules, out, scratch, n, k, group, bits, anchors, part, parts):  # type: ignore[no-untyped-def]
    table = floats(rules, (TABLE_SIZE,))
    x = scratch + part * SCRATCH_BYTES
    first_tile, end_tile = share((n + TILE_ROWS - 1) // TILE_ROWS, part, parts)
    blocks, block_bytes = (k + BLOCK_K - 1) // BLOCK_K, HEADER_BYTES + BLOCK_K * TILE_ROWS * bits // 8
    for tile in range(first_tile, end_tile):
        row = tile * TILE_ROWS
        for block in range(blocks):
            column = block * BLOCK_K
            target = out + (tile * blocks + block) * block_bytes
            _open_block(weight + (row * k + column) * 4, min(TILE_ROWS, n - row), min(BLOCK_K, k - column), k, x)
            power = _normalise(x)
            if table[LEVELS] == ZERO:
                _encode_groups(x, group, power, table, anchors, target)
            else:
                _encode_two_scales(x, group, power, table, anchors, target)
            _pack_codes(x + CODES, bits, target + HEADER_BYTES)


def _encode(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """Pack weight [n, k], float32 and finite. Arguments: those of _part, the first four addresses."""
    weight, rules, out, scratch, n, k, group, bits, anchors = arguments_of(arguments, 9)
    _part(weight, rules, out, scratch, n, k, group, bits, anchors, part, parts)
    return 0


encode = Kernel(_encode)

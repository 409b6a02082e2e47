"""Weights into packed blocks: what quant/encode_reference.py does, with the same bytes, 16 rows at a time.

A tile's rows are the lanes of `Lanes`; how much a column counts is one number for a whole vector. One block of 16 rows
by 128 columns is worked on at a time, all the way from its published form: it is made float32, transposed, so that a
column is one load, searched and written out before the next one is read, and never leaves the first-level cache.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from quant.encode_reference import (
    ANCHORS,
    LARGEST_POWER,
    NEGLIGIBLE,
    NOTHING,
    SMALLEST_POWER,
    TOP_INTEGERS,
    largest_scale,
    level_range,
    midpoints,
)
from quant.kernels.atomics import arguments_of
from quant.kernels.decode import ACCURATE_CODE, BLOCK_BYTES, FAST_CODE
from quant.kernels.jit import Kernel, inner
from quant.kernels.lanes import (
    fill,
    join_bits,
    load,
    magnitude,
    nearest_bf16,
    power_below,
    store,
    transpose,
    where_less,
)
from quant.kernels.tiles import doubles, floats, share
from quant.kernels.widen import widen_row
from quant.packed import (
    ACCURATE,
    BLOCK_K,
    FAST,
    HIGHEST_INTEGER,
    INTEGER_STEP,
    LINE,
    LOWEST_INTEGER,
    TILE_ROWS,
    PackedFormat,
)

VECTOR = 4 * TILE_ROWS  # bytes of one float32 a row
MOST_GROUPS = 8  # in a block's row
MOST_ANCHORS, TOPS = max(map(len, ANCHORS.values())), max(map(len, TOP_INTEGERS.values()))
# Scratch of one thread, in bytes from its start: the block's columns, a vector for each group, three for each fit,
# sums, and the block's rows.
INTEGERS = BLOCK_K * VECTOR
FITS = INTEGERS + MOST_GROUPS * VECTOR
FIT_BYTES = 3 * VECTOR
SUMS = FITS + MOST_GROUPS * MOST_ANCHORS * FIT_BYTES
SUM_COUNT = 4  # of squares: the weights, the errors, and both times what their columns count
ROWS = SUMS + SUM_COUNT * VECTOR
SCRATCH_BYTES = ROWS + TILE_ROWS * BLOCK_K * 4

# What the search needs to know of a format: a table of float32, these first. Evenly spaced levels are a range, others
# are listed, with the midpoints between them.
LOWEST, HIGHEST, CODE_OF_ZERO, LARGEST_SCALE, LOWEST_OF_INTEGERS, HIGHEST_OF_INTEGERS, STEP_OF_INTEGERS = range(7)
MIDPOINTS = STEP_OF_INTEGERS + 1
LEVELS = MIDPOINTS + 15
FIRST_TOP = LEVELS + 16
FIRST_ANCHOR = FIRST_TOP + TOPS
TABLE_SIZE = FIRST_ANCHOR + MOST_ANCHORS

ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
SIXTEENTH = np.float32(1 / 16)
ROUNDING = np.float32(1.5 * 2**23)  # float32 this large have no fraction: adding it rounds, halves to even


@cache
def search_table(fmt: PackedFormat) -> NDArray[np.float32]:
    """The numbers that steer the search for `fmt`."""
    table = np.zeros(TABLE_SIZE, np.float32)
    table[LOWEST], table[HIGHEST] = level_range(fmt)
    table[CODE_OF_ZERO], table[LARGEST_SCALE] = fmt.zero, largest_scale(fmt)
    if (kind := fmt.integers) is not None:
        table[LOWEST_OF_INTEGERS], table[HIGHEST_OF_INTEGERS] = LOWEST_INTEGER[kind], HIGHEST_INTEGER[kind]
        table[STEP_OF_INTEGERS], table[FIRST_TOP:FIRST_ANCHOR] = INTEGER_STEP[kind], TOP_INTEGERS[kind]
    if fmt.levels is not None:
        table[MIDPOINTS:LEVELS], table[LEVELS:FIRST_TOP] = midpoints(fmt), fmt.levels
    anchors = ANCHORS[fmt.name]
    table[FIRST_ANCHOR : FIRST_ANCHOR + len(anchors)] = anchors
    return table


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
    def fit(x, columns, group, inverse, table):  # type: ignore[no-untyped-def]
        """Σ c level × x and Σ c level² of one group, whose first column is at address x; c: from address `columns`."""
        products, squares, counts = fill(ZERO), fill(ZERO), floats(columns, (group,))
        for k in range(group):
            value = load(x + k * VECTOR)
            level = nearest_level(value * inverse, table)
            counted = level * fill(counts[k])
            products = products + counted * value
            squares = squares + counted * level
        return products, squares

    return fit


def _make_put_codes(nearest_code, bits):  # type: ignore[no-untyped-def]
    columns = 32 // bits  # of a row, in a line

    @inner
    def put_codes(x, group, inverse, table, lines):  # type: ignore[no-untyped-def]
        """Write the codes of one group, in lines of 64 bytes in which each row owns four, to address `lines`."""
        for line in range(group // columns):
            word = fill(ZERO)
            for i in range(columns):
                code = nearest_code(load(x + (line * columns + i) * VECTOR) * inverse, table)
                word = join_bits(word, code, 255, i % 4 * 8 + i // 4 * 4)
            store(lines + line * LINE, word)

    return put_codes


def _make_measure(nearest_level):  # type: ignore[no-untyped-def]
    @inner
    def measure(x, columns, group, scale, table, sums):  # type: ignore[no-untyped-def]
        """Add to the four vectors at address `sums`, of `group` columns, Σ x², Σ off², Σ c x² and Σ c off²."""
        inverse, counts = _over(fill(ONE), scale), floats(columns, (group,))
        own, off_own, counted, off_counted = (
            load(sums),
            load(sums + VECTOR),
            load(sums + 2 * VECTOR),
            load(sums + 3 * VECTOR),
        )
        for k in range(group):
            value = load(x + k * VECTOR)
            off = value - nearest_level(value * inverse, table) * scale
            square, off_square, count = value * value, off * off, fill(counts[k])
            own, off_own = own + square, off_own + off_square
            counted, off_counted = counted + count * square, off_counted + count * off_square
        store(sums, own)
        store(sums + VECTOR, off_own)
        store(sums + 2 * VECTOR, counted)
        store(sums + 3 * VECTOR, off_counted)

    return measure


_fit_even, _fit_listed = _make_fit(_even_level), _make_fit(_listed_level)
_measure_even, _measure_listed = _make_measure(_even_level), _make_measure(_listed_level)
_put_even_codes, _put_listed_codes = _make_put_codes(_even_code, 4), _make_put_codes(_listed_code, 4)
_put_bytes = _make_put_codes(_even_code, 8)


@inner
def _error(x, columns, group, scale, table):  # type: ignore[no-untyped-def]
    """Σ c (x - level × scale)², with the nearest of evenly spaced levels."""
    inverse, total, counts = _over(fill(ONE), scale), fill(ZERO), floats(columns, (group,))
    for k in range(group):
        value = load(x + k * VECTOR)
        off = value - _even_level(value * inverse, table) * scale
        total = total + off * fill(counts[k]) * off
    return total


@inner
def _peak(x, group):  # type: ignore[no-untyped-def]
    """The group's value of largest magnitude, the positive one of equals; 0 where it is negligible."""
    highest, lowest = load(x), load(x)
    for k in range(1, group):
        value = load(x + k * VECTOR)
        highest, lowest = where_less(highest, value, value, highest), where_less(value, lowest, value, lowest)
    peak = where_less(highest, fill(ZERO) - lowest, lowest, highest)
    return where_less(magnitude(peak), fill(NEGLIGIBLE), fill(ZERO), peak)


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
    """A scale times its row's power of two, as a bfloat16 holds it; never below 0."""
    return nearest_bf16(_clip(scale * power, ZERO, table[LARGEST_SCALE])) + fill(ZERO)


@inner
def _encode_one_scale(x, columns, power, table, anchors, measured, block):  # type: ignore[no-untyped-def]
    """Write a block without integers to address `block`."""
    peak = magnitude(_peak(x, BLOCK_K))
    best, least = fill(ZERO), fill(INFINITY)
    for a in range(anchors):
        stored = _stored(peak / fill(table[FIRST_ANCHOR + a]), power, table)
        error = _error(x, columns, BLOCK_K, stored * (fill(ONE) / power), table)
        best, least = where_less(error, least, stored, best), where_less(error, least, error, least)
    store(block, best)
    d = best * (fill(ONE) / power)
    _put_bytes(x, BLOCK_K, _over(fill(ONE), d), table, block + LINE)
    _measure_even(x, columns, measured, d, table, x + SUMS)


@inner
def _nearest_number(scale, inverse, table):  # type: ignore[no-untyped-def]
    """Which of the allowed integers is nearest to scale × inverse, counted from the lowest: as it is stored."""
    lowest = table[LOWEST_OF_INTEGERS]
    above = _clip(scale * inverse, lowest, table[HIGHEST_OF_INTEGERS]) - fill(lowest)
    return _rint(above * fill(ONE / table[STEP_OF_INTEGERS]))


@inner
def _integer(number, table):  # type: ignore[no-untyped-def]
    return number * fill(table[STEP_OF_INTEGERS]) + fill(table[LOWEST_OF_INTEGERS])


@inner
def _cheapest(fits, anchors, d, table):  # type: ignore[no-untyped-def]
    """Of a group's fits, the one that costs least with a multiple of d as its scale: that integer, and the cost."""
    inverse = _over(fill(ONE), d)
    best, least = fill(ZERO), fill(INFINITY)
    for a in range(anchors):
        fit = fits + a * FIT_BYTES
        scale = load(fit)
        number = _nearest_number(scale, inverse, table)
        off = _integer(number, table) * d - scale
        cost = load(fit + VECTOR) * off * off - load(fit + 2 * VECTOR)
        best, least = where_less(cost, least, number, best), where_less(cost, least, cost, least)
    return best, least


@inner
def _search_d(fits, groups, anchors, top, power, table):  # type: ignore[no-untyped-def]
    """The d, over its row's power of two, with which the groups' fits cost least."""
    best, least = fill(ZERO), fill(INFINITY)
    for i in range(TOPS):
        d = _stored(top / fill(table[FIRST_TOP + i]), power, table) * (fill(ONE) / power)
        cost = fill(ZERO)
        for g in range(groups):
            cost = cost + _cheapest(fits + g * anchors * FIT_BYTES, anchors, d, table)[1]
        best, least = where_less(cost, least, d, best), where_less(cost, least, cost, least)
    return best


@inner
def _put_header(numbers, groups, d, two_lines, header):  # type: ignore[no-untyped-def]
    """d with the upper two bits of the integers, and their lower four in a second line, if there are two."""
    upper, lower = d, fill(ZERO) if two_lines else d
    for g in range(groups):
        number = load(numbers + g * VECTOR)
        upper = join_bits(upper, number * fill(SIXTEENTH), 3, 2 * g)
        lower = join_bits(lower, number, 15, 4 * g)
    store(header, upper)
    store(header + (LINE if two_lines else 0), lower)


def _make_encode_two_scales(fit, put_codes, measure, group, two_lines):  # type: ignore[no-untyped-def]
    groups, header_bytes = BLOCK_K // group, LINE * (1 + two_lines)

    @inner
    def fit_anchors(x, columns, fits, anchors, table):  # type: ignore[no-untyped-def]
        """Each anchor's scale, Σ c level² and gain of one group to address `fits`; the scale with the largest gain."""
        peak, best, most = _peak(x, group), fill(ZERO), fill(-ONE)
        for a in range(anchors):
            inverse = _over(fill(table[FIRST_ANCHOR + a]), peak)
            products, squares = fit(x, columns, group, inverse, table)
            scale = products / where_less(squares, fill(NOTHING), fill(ONE), squares)
            gain = scale * products
            store(fits + a * FIT_BYTES, scale)
            store(fits + a * FIT_BYTES + VECTOR, squares)
            store(fits + a * FIT_BYTES + 2 * VECTOR, gain)
            best, most = where_less(most, gain, scale, best), where_less(most, gain, gain, most)
        return best

    @inner
    def refit(x, columns, d, power, table):  # type: ignore[no-untyped-def]
        """The best d, as stored, for the block's integers and the levels that are nearest with the d so far."""
        numerator, denominator = fill(ZERO), fill(ZERO)
        for g in range(groups):
            integer = _integer(load(x + INTEGERS + g * VECTOR), table)
            inverse = _over(fill(ONE), integer * d)
            products, squares = fit(x + g * group * VECTOR, columns + g * group * 4, group, inverse, table)
            numerator = numerator + integer * products
            denominator = denominator + integer * integer * squares
        return _stored(_over(numerator, denominator), power, table)

    @inner
    def encode_two_scales(x, columns, power, table, anchors, measured, block):  # type: ignore[no-untyped-def]
        """Write a block with integers to address `block`."""
        top, fits = fill(ZERO), x + FITS
        for g in range(groups):
            own = fits + g * anchors * FIT_BYTES
            scale = magnitude(fit_anchors(x + g * group * VECTOR, columns + g * group * 4, own, anchors, table))
            top = where_less(top, scale, scale, top)
        d = _search_d(fits, groups, anchors, top, power, table)
        for g in range(groups):
            store(x + INTEGERS + g * VECTOR, _cheapest(fits + g * anchors * FIT_BYTES, anchors, d, table)[0])
        stored = refit(x, columns, d, power, table)
        _put_header(x + INTEGERS, groups, stored, two_lines, block)
        d = stored * (fill(ONE) / power)
        for g in range(groups):
            scale = _integer(load(x + INTEGERS + g * VECTOR), table) * d
            lines = block + header_bytes + g * group * TILE_ROWS // 2
            put_codes(x + g * group * VECTOR, group, _over(fill(ONE), scale), table, lines)
            width = max(0, min(group, measured - g * group))
            measure(x + g * group * VECTOR, columns + g * group * 4, width, scale, table, x + SUMS)

    return encode_two_scales


_encode_fast = _make_encode_two_scales(_fit_even, _put_even_codes, _measure_even, FAST.group, two_lines=False)
_encode_accurate = _make_encode_two_scales(
    _fit_listed, _put_listed_codes, _measure_listed, ACCURATE.group, two_lines=True
)


@inner
def _open_block(weight, scales, row, rows, column, columns, k, source, x):  # type: ignore[no-untyped-def]
    """Write a block as float32 to address x: column by column, filled up with zeros."""
    plain = x + ROWS
    if rows != TILE_ROWS or columns != BLOCK_K:
        floats(plain, (TILE_ROWS * BLOCK_K,))[:] = ZERO
    for r in range(rows):
        widen_row(weight, scales, row + r, column, columns, k, source, plain + r * BLOCK_K * 4)
    for first in range(0, BLOCK_K, TILE_ROWS):
        transpose(plain + first * 4, BLOCK_K * 4, x + first * VECTOR)


@inner
def _clear_sums(x):  # type: ignore[no-untyped-def]
    for number in range(SUM_COUNT):
        store(x + SUMS + number * VECTOR, fill(ZERO))


@inner
def _add_sums(x, power, totals):  # type: ignore[no-untyped-def]
    """Add a block's sums to `totals`, float64 [4], times the squares of the rows' powers of two."""
    store(x, power)  # the columns are not needed any more
    powers = floats(x, (TILE_ROWS,))
    for number in range(SUM_COUNT):
        sums = floats(x + SUMS + number * VECTOR, (TILE_ROWS,))
        for row in range(TILE_ROWS):
            totals[number] += np.float64(sums[row]) * np.float64(powers[row]) * np.float64(powers[row])


@inner
def _encode_block(x, counts, power, table, code, anchors, measured, target):  # type: ignore[no-untyped-def]
    if code == FAST_CODE:
        _encode_fast(x, counts, power, table, anchors, measured, target)
    elif code == ACCURATE_CODE:
        _encode_accurate(x, counts, power, table, anchors, measured, target)
    else:
        _encode_one_scale(x, counts, power, table, anchors, measured, target)


@inner
def _part(weight, scales, rules, out, scratch, columns, errors, n, k, source, code, anchors, part, parts):  # type: ignore[no-untyped-def]
    table = floats(rules, (TABLE_SIZE,))
    x, totals = scratch + part * SCRATCH_BYTES, doubles(errors + part * SUM_COUNT * 8, (SUM_COUNT,))
    first_tile, end_tile = share((n + TILE_ROWS - 1) // TILE_ROWS, part, parts)
    blocks = (k + BLOCK_K - 1) // BLOCK_K
    for tile in range(first_tile, end_tile):
        row = tile * TILE_ROWS
        for block in range(blocks):
            column = block * BLOCK_K
            measured = min(BLOCK_K, k - column)  # columns; filling is left out
            _open_block(weight, scales, row, min(TILE_ROWS, n - row), column, measured, k, source, x)
            power, target = _normalise(x), out + (tile * blocks + block) * BLOCK_BYTES[code]
            _clear_sums(x)
            _encode_block(x, columns + column * 4, power, table, code, anchors, measured, target)
            _add_sums(x, power, totals)


def _encode(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """Pack weight [n, k], as widen_row takes it. Arguments: those of _part, the first seven addresses.

    columns: float32, how much errors in each column count, filled up to whole blocks. errors: float64 [parts, 4],
    zeros, to which the sums of squares of weights and errors are added: not finite exactly if a weight is not, as
    _normalise keeps finite squares finite.
    """
    weight, scales, rules, out, scratch, columns, errors, n, k, source, code, anchors = arguments_of(arguments, 12)
    _part(weight, scales, rules, out, scratch, columns, errors, n, k, source, code, anchors, part, parts)
    return 0


encode = Kernel(_encode)

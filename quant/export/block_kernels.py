"""Weights into blocks: what quant/export/block_reference.py does, with the same bytes, 16 blocks at a time.

Blocks are the lanes of `Lanes`. Sixteen are worked on at a time, transposed, so that the values at one place of all of
them are one load; their scales are searched together, and then each block's codes are written from its own values.
"""

from typing import Any

import numba
import numpy as np

from quant.export import block_reference as reference
from quant.export.block_reference import ANCHORS, GROUPS, LARGEST_HALF, LEVELS, MOST_INTEGER, MOST_SCALE
from quant.export.block_types import INT4_32, INT4_128, Q4_0, Q4_K, Q5_0, Q6_K, Q8_0, SUPER_BLOCK, BlockType
from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner
from quant.kernels.lanes import fill, load, magnitude, nearest_bf16, store, transpose, where_less
from quant.kernels.tiles import floats, share, words
from quant.kernels.vector import LANES, pointer

VECTOR = 4 * LANES  # bytes of one float32 a block
# Scratch of one thread, in bytes from its start: the blocks' values; vectors for each group; what is found, which are
# up to two scales and up to 16 integers; one block's codes.
MOST_GROUPS = 16
REGION = MOST_GROUPS * VECTOR
FITS = SUPER_BLOCK * VECTOR
MINIMA = FITS + REGION
SCALE = MINIMA + REGION
SECOND_SCALE = SCALE + VECTOR
INTEGERS = SECOND_SCALE + VECTOR
SECOND_INTEGERS = INTEGERS + REGION
CODES = SECOND_INTEGERS + REGION
SCRATCH_BYTES = CODES + SUPER_BLOCK
# Sums of one group after a fit.
LEVEL_SUM, SQUARES, PRODUCTS = range(3)

ZERO, ONE, HALF, MINUS_ONE = np.float32(0), np.float32(1), np.float32(0.5), np.float32(-1)
SPLIT, SMALLEST_NORMAL = reference.SPLIT, reference.SMALLEST_NORMAL
ROUNDING = np.float32(1.5 * 2**23)  # float32 this large have no fraction: adding it rounds, halves to even
OVER_127, OVER_INTEGER, OVER_SCALE = (np.float32(1 / most) for most in (127, MOST_INTEGER, MOST_SCALE))
LINE_ANCHORS = np.array(ANCHORS["Q4_K"], np.float32)
LINE_GROUPS, LINE_SIZE = GROUPS["Q4_K"], SUPER_BLOCK // GROUPS["Q4_K"]
SIX_GROUPS, SIX_SIZE = GROUPS["Q6_K"], SUPER_BLOCK // GROUPS["Q6_K"]
COUNT, OVER_COUNT = np.float32(LINE_SIZE), np.float32(1 / LINE_SIZE)
TOP_LEVEL, TOP_SCALE = np.float32(LEVELS["Q4_K"][1]), np.float32(MOST_SCALE)


# Lanes


@inner
def _smaller(a, b):  # type: ignore[no-untyped-def]
    return where_less(a, b, a, b)


@inner
def _larger(a, b):  # type: ignore[no-untyped-def]
    return where_less(a, b, b, a)


@inner
def _rounded(value, lowest, highest):  # type: ignore[no-untyped-def]
    """The nearest whole number in the range."""
    return _smaller(_larger(value, fill(lowest)), fill(highest)) + fill(ROUNDING) - fill(ROUNDING)


@inner
def _over(numerator, divisor):  # type: ignore[no-untyped-def]
    """numerator / divisor, and 0 where the divisor is 0."""
    zero = fill(ZERO)
    return where_less(zero, magnitude(divisor), numerator / divisor, zero)


@inner
def _nearest_half(value):  # type: ignore[no-untyped-def]
    """What half precision holds."""
    bounded = _smaller(_larger(value, fill(-LARGEST_HALF)), fill(LARGEST_HALF))
    large = bounded * fill(SPLIT)
    size = magnitude(bounded)
    small = (size + fill(HALF)) - fill(HALF)
    small = where_less(bounded, fill(ZERO), fill(ZERO) - small, small)
    return where_less(size, fill(SMALLEST_NORMAL), small, large - (large - bounded)) + fill(ZERO)


@inner
def _peak(x, count):  # type: ignore[no-untyped-def]
    """Of `count` vectors at address x the value of largest magnitude, the positive one of equals."""
    highest, lowest = load(x), load(x)
    for k in range(1, count):
        value = load(x + k * VECTOR)
        highest, lowest = _larger(highest, value), _smaller(lowest, value)
    return where_less(highest, fill(ZERO) - lowest, lowest, highest)


@inner
def _largest(x, count):  # type: ignore[no-untyped-def]
    highest = load(x)
    for k in range(1, count):
        highest = _larger(highest, load(x + k * VECTOR))
    return highest


@inner
def _total(x, count):  # type: ignore[no-untyped-def]
    total = fill(ZERO)
    for k in range(count):
        total = total + load(x + k * VECTOR)
    return total


def _make_best_scale(name: str, size: int) -> tuple[Any, Any]:
    lowest, highest = (np.float32(level) for level in LEVELS[name])
    anchors = np.array(ANCHORS[name], np.float32)

    @inner
    def fit(x, inverse):  # type: ignore[no-untyped-def]
        """Σ level² and Σ level × x of the values at address x, with the levels nearest to x × inverse."""
        squares, products = fill(ZERO), fill(ZERO)
        for k in range(size):
            value = load(x + k * VECTOR)
            level = _rounded(value * inverse, lowest, highest)
            squares = squares + level * level
            products = products + level * value
        return squares, products

    @inner
    def best_scale(x):  # type: ignore[no-untyped-def]
        peak = _peak(x, size)
        best, most = fill(ZERO), fill(MINUS_ONE)
        for a in range(len(anchors)):
            squares, products = fit(x, _over(fill(anchors[a]), peak))
            scale = products / _larger(squares, fill(ONE))
            gain = scale * products
            best, most = where_less(most, gain, scale, best), where_less(most, gain, gain, most)
        return best

    return fit, best_scale


# Searches: from the values at the start of the scratch to scales and integers


def _make_one_scale(kind: BlockType, nearest: Any) -> Any:
    """nearest: to the scales that there are."""
    fit, best_scale = _make_best_scale(kind.name, kind.block)

    @inner
    def search(x):  # type: ignore[no-untyped-def]
        squares, products = fit(x, _over(fill(ONE), nearest(best_scale(x))))
        store(x + SCALE, nearest(_over(products, squares)) + fill(ZERO))

    return search


@inner
def _largest_scale(x):  # type: ignore[no-untyped-def]
    """Of Q8_0."""
    store(x + SCALE, _nearest_half(magnitude(_peak(x, 32)) * fill(OVER_127)))


_fit_six, _best_six = _make_best_scale("Q6_K", SIX_SIZE)


@inner
def _two_scales(x):  # type: ignore[no-untyped-def]
    """Of Q6_K."""
    for g in range(SIX_GROUPS):
        store(x + FITS + g * VECTOR, _best_six(x + g * SIX_SIZE * VECTOR))
    first = _nearest_half(_peak(x + FITS, SIX_GROUPS) * fill(OVER_INTEGER))
    inverse = _over(fill(ONE), first)
    numerator, denominator = fill(ZERO), fill(ZERO)
    for g in range(SIX_GROUPS):
        integer = _rounded(load(x + FITS + g * VECTOR) * inverse, np.float32(-128), np.float32(127))
        store(x + INTEGERS + g * VECTOR, integer)
        squares, products = _fit_six(x + g * SIX_SIZE * VECTOR, _over(fill(ONE), integer * first))
        numerator = numerator + integer * products
        denominator = denominator + integer * integer * squares
    store(x + SCALE, _nearest_half(_over(numerator, denominator)))


@inner
def _fit_line(x, inverse, minimum):  # type: ignore[no-untyped-def]
    """Σ level, Σ level² and Σ level × x of one group of Q4_K."""
    levels, squares, products = fill(ZERO), fill(ZERO), fill(ZERO)
    for k in range(LINE_SIZE):
        value = load(x + k * VECTOR)
        level = _rounded((value + minimum) * inverse, ZERO, TOP_LEVEL)
        levels = levels + level
        squares = squares + level * level
        products = products + level * value
    return levels, squares, products


@inner
def _line(fit, sum_x):  # type: ignore[no-untyped-def]
    """Scale and offset, 0 or less, with the least error for the levels of `fit`."""
    levels, squares, products = fit
    zero, count = fill(ZERO), fill(COUNT)
    determinant = count * squares - levels * levels
    scale = _over(count * products - sum_x * levels, determinant)
    offset = _over(squares * sum_x - levels * products, determinant)
    scale = where_less(offset, zero, scale, _over(products, squares))
    return scale, where_less(offset, zero, offset, zero)


@inner
def _best_line(x):  # type: ignore[no-untyped-def]
    """Scale and minimum, both 0 or more, of one group of Q4_K."""
    zero = fill(ZERO)
    lowest = load(x)
    for k in range(1, LINE_SIZE):
        lowest = _smaller(lowest, load(x + k * VECTOR))
    lowest = _smaller(lowest, zero)
    span, sum_x = _largest(x, LINE_SIZE) - lowest, _total(x, LINE_SIZE)
    best, minimum, most = zero, zero - lowest, fill(MINUS_ONE)
    for a in range(len(LINE_ANCHORS)):
        fit = _fit_line(x, _over(fill(LINE_ANCHORS[a]), span), zero - lowest)
        scale, offset = _line(fit, sum_x)
        gain = scale * fit[PRODUCTS] + offset * sum_x
        best = where_less(most, gain, scale, best)
        minimum = where_less(most, gain, zero - offset, minimum)
        most = where_less(most, gain, gain, most)
    return _larger(best, zero), minimum + zero


@inner
def _scales_and_minima(x):  # type: ignore[no-untyped-def]
    """Of Q4_K."""
    for g in range(LINE_GROUPS):
        scale, minimum = _best_line(x + g * LINE_SIZE * VECTOR)
        store(x + FITS + g * VECTOR, scale)
        store(x + MINIMA + g * VECTOR, minimum)
    d = _nearest_half(_largest(x + FITS, LINE_GROUPS) * fill(OVER_SCALE))
    dmin = _nearest_half(_largest(x + MINIMA, LINE_GROUPS) * fill(OVER_SCALE))
    over_d, over_dmin = _over(fill(ONE), d), _over(fill(ONE), dmin)
    for g in range(LINE_GROUPS):
        group = x + g * LINE_SIZE * VECTOR
        scale = _rounded(load(x + FITS + g * VECTOR) * over_d, ZERO, TOP_SCALE)
        minimum = _rounded(load(x + MINIMA + g * VECTOR) * over_dmin, ZERO, TOP_SCALE)
        fit = _fit_line(group, _over(fill(ONE), scale * d), minimum * dmin)
        off = (scale * d) * fit[LEVEL_SUM] - _total(group, LINE_SIZE)
        store(x + INTEGERS + g * VECTOR, scale)
        store(x + SECOND_INTEGERS + g * VECTOR, _rounded(off * fill(OVER_COUNT) * over_dmin, ZERO, TOP_SCALE))
    _refit(x, d, dmin)


@inner
def _refit(x, d, dmin):  # type: ignore[no-untyped-def]
    """Store the best d and dmin for the integers and the levels that are nearest with those so far."""
    zero = fill(ZERO)
    aa, ax, ab, bx, bb = zero, zero, zero, zero, zero
    for g in range(LINE_GROUPS):
        group = x + g * LINE_SIZE * VECTOR
        scale, minimum = load(x + INTEGERS + g * VECTOR), load(x + SECOND_INTEGERS + g * VECTOR)
        levels, squares, products = _fit_line(group, _over(fill(ONE), scale * d), minimum * dmin)
        aa = aa + scale * scale * squares
        ax = ax + scale * products
        ab = ab + scale * minimum * levels
        bx = bx + minimum * _total(group, LINE_SIZE)
        bb = bb + minimum * minimum
    bb = bb * fill(COUNT)
    determinant = aa * bb - ab * ab
    new_d, new_min = _over(ax * bb - ab * bx, determinant), _over(ab * ax - aa * bx, determinant)
    usable = _smaller(_smaller(determinant, new_d), new_min)
    store(x + SCALE, where_less(zero, usable, _nearest_half(new_d), d))
    store(x + SECOND_SCALE, where_less(zero, usable, _nearest_half(new_min), dmin))


# Packing: one block's bytes from its values and from what was found


@inner
def _octets(address, count):  # type: ignore[no-untyped-def]
    return numba.carray(pointer(address), (count,), np.uint8)


@inner
def _found(x, lane):  # type: ignore[no-untyped-def]
    """A block's value of the vector at address x."""
    return floats(x + 4 * lane, (1,))[0]


@inner
def _put_half(x, lane, out):  # type: ignore[no-untyped-def]
    """Write a value that half precision holds to the two bytes at `out`."""
    bits = np.uint32(words(x + 4 * lane, (1,))[0])
    exponent, half = np.int64(bits >> np.uint32(23) & np.uint32(0xFF)), np.uint32(0)
    mantissa = bits & np.uint32(0x7FFFFF)
    if exponent > 112:
        half = np.uint32(exponent - 112) << np.uint32(10) | mantissa >> np.uint32(13)
    elif exponent > 102:
        half = (mantissa | np.uint32(0x800000)) >> np.uint32(126 - exponent)
    half |= bits >> np.uint32(16) & np.uint32(0x8000)
    target = _octets(out, 2)
    target[0], target[1] = half & np.uint32(255), half >> np.uint32(8)


@inner
def _inverse(scale):  # type: ignore[no-untyped-def]
    return ONE / scale if scale != ZERO else ZERO


@inner
def _put_codes(values, minimum, inverse, lowest, highest, codes):  # type: ignore[no-untyped-def]
    """codes uint8 = the levels nearest to (values + minimum) × inverse, less the lowest of them."""
    for i in range(len(values)):
        scaled = (values[i] + minimum) * inverse
        scaled = lowest if scaled < lowest else scaled
        scaled = highest if scaled > highest else scaled
        codes[i] = np.uint8(np.int32(scaled + ROUNDING - ROUNDING - lowest))


def _make_pack_one_scale(kind: BlockType) -> Any:
    lowest, highest = (np.float32(level) for level in LEVELS[kind.name])
    has_fifth, size = kind.name == "Q5_0", kind.block

    @inner
    def pack(x, values, lane, out):  # type: ignore[no-untyped-def]
        codes = _octets(x + CODES, size)
        _put_half(x + SCALE, lane, out)
        _put_codes(floats(values, (size,)), ZERO, _inverse(_found(x + SCALE, lane)), lowest, highest, codes)
        nibbles = out + 2
        if has_fifth:
            fifth = _octets(nibbles, 4)
            for i in range(4):
                bits = np.uint8(0)
                for j in range(8):
                    bits |= codes[8 * i + j] >> np.uint8(4) << np.uint8(j)
                fifth[i] = bits
            nibbles += 4
        target = _octets(nibbles, size // 2)
        for i in range(size // 2):
            target[i] = codes[i] & np.uint8(15) | codes[i + size // 2] << np.uint8(4)

    return pack


def _make_pack_int4(kind: BlockType) -> Any:
    lowest, highest = (np.float32(level) for level in LEVELS[kind.name])
    size = kind.block

    @inner
    def pack(x, values, lane, out):  # type: ignore[no-untyped-def]
        codes, scale = _octets(x + CODES, size), _octets(x + SCALE + 4 * lane, 4)
        target = _octets(out, 2 + size // 2)
        target[0], target[1] = scale[2], scale[3]
        _put_codes(floats(values, (size,)), ZERO, _inverse(_found(x + SCALE, lane)), lowest, highest, codes)
        for i in range(size // 2):
            target[2 + i] = codes[2 * i] | codes[2 * i + 1] << np.uint8(4)

    return pack


@inner
def _pack_q8_0(x, values, lane, out):  # type: ignore[no-untyped-def]
    _put_half(x + SCALE, lane, out)
    target, lowest = _octets(out + 2, 32), np.float32(-127)
    _put_codes(floats(values, (32,)), ZERO, _inverse(_found(x + SCALE, lane)), lowest, -lowest, target)
    for i in range(32):
        target[i] -= np.uint8(127)


@inner
def _pack_q6_k(x, values, lane, out):  # type: ignore[no-untyped-def]
    codes, integers, d = _octets(x + CODES, 256), _octets(out + 192, SIX_GROUPS), _found(x + SCALE, lane)
    for g in range(SIX_GROUPS):
        integer = _found(x + INTEGERS + g * VECTOR, lane)
        integers[g] = np.uint8(np.int32(integer))
        group, target = floats(values + g * SIX_SIZE * 4, (SIX_SIZE,)), codes[g * SIX_SIZE : (g + 1) * SIX_SIZE]
        _put_codes(group, ZERO, _inverse(integer * d), np.float32(-32), np.float32(31), target)
    _put_half(x + SCALE, lane, out + 208)
    lower, upper = _octets(out, 128), _octets(out + 128, 64)
    for half in range(2):
        first = 128 * half
        for i in range(64):
            low, high = codes[first + i], codes[first + 64 + i]
            lower[64 * half + i] = low & np.uint8(15) | high << np.uint8(4)
        for i in range(32):
            pair = codes[first + i] >> np.uint8(4) | codes[first + 32 + i] >> np.uint8(4) << np.uint8(2)
            pair |= codes[first + 64 + i] >> np.uint8(4) << np.uint8(4)
            upper[32 * half + i] = pair | codes[first + 96 + i] >> np.uint8(4) << np.uint8(6)


@inner
def _pack_q4_k(x, values, lane, out):  # type: ignore[no-untyped-def]
    _put_half(x + SCALE, lane, out)
    _put_half(x + SECOND_SCALE, lane, out + 2)
    codes, integers = _octets(x + CODES, 256), _octets(out + 4, 12)
    d, dmin = _found(x + SCALE, lane), _found(x + SECOND_SCALE, lane)
    for g in range(LINE_GROUPS):
        scale = _found(x + INTEGERS + g * VECTOR, lane)
        minimum = _found(x + SECOND_INTEGERS + g * VECTOR, lane)
        group, target = floats(values + g * LINE_SIZE * 4, (LINE_SIZE,)), codes[g * LINE_SIZE : (g + 1) * LINE_SIZE]
        _put_codes(group, minimum * dmin, _inverse(scale * d), ZERO, TOP_LEVEL, target)
        first, second = np.uint8(np.int32(scale)), np.uint8(np.int32(minimum))
        if g < 4:
            integers[g], integers[g + 4] = first, second
        else:
            integers[g - 4] |= first >> np.uint8(4) << np.uint8(6)
            integers[g] |= second >> np.uint8(4) << np.uint8(6)
            integers[g + 4] = first & np.uint8(15) | second << np.uint8(4)
    target = _octets(out + 16, 128)
    for pair in range(4):
        for i in range(32):
            target[32 * pair + i] = codes[64 * pair + i] | codes[64 * pair + 32 + i] << np.uint8(4)


# Kernels


@inner
def _open(values, rows, size, x):  # type: ignore[no-untyped-def]
    """Copy up to 16 blocks of `size` values to address x, value by value, with zeros for blocks that are not there."""
    if rows == LANES:
        for k in range(0, size, LANES):
            transpose(values + k * 4, size * 4, x + k * VECTOR)
        return
    columns = floats(x, (size, LANES))
    columns[:] = ZERO
    for r in range(rows):
        block = floats(values + r * size * 4, (size,))
        for k in range(size):
            columns[k, r] = block[k]


def _make_kernel(kind: BlockType, search: Any, pack: Any) -> Kernel:
    size, block_bytes = kind.block, kind.block_bytes

    @inner
    def encode_part(values, out, scratch, count, part, parts):  # type: ignore[no-untyped-def]
        x = scratch + part * SCRATCH_BYTES
        begin, end = share((count + LANES - 1) // LANES, part, parts)
        for first in range(begin * LANES, min(end * LANES, count), LANES):
            rows, address = min(LANES, count - first), values + first * size * 4
            _open(address, rows, size, x)
            search(x)
            for r in range(rows):
                pack(x, address + r * size * 4, r, out + (first + r) * block_bytes)

    def encode(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
        """Write `count` blocks to address `out`. Arguments: addresses of values, out and scratch, and count."""
        values, out, scratch, count = arguments_of(arguments, 4)
        encode_part(values, out, scratch, count, part, parts)
        return 0

    return Kernel(encode, f"{__name__}.{kind.name}")


BLOCK_KERNELS = {
    Q4_0: _make_kernel(Q4_0, _make_one_scale(Q4_0, _nearest_half), _make_pack_one_scale(Q4_0)),
    Q5_0: _make_kernel(Q5_0, _make_one_scale(Q5_0, _nearest_half), _make_pack_one_scale(Q5_0)),
    Q8_0: _make_kernel(Q8_0, _largest_scale, _pack_q8_0),
    Q4_K: _make_kernel(Q4_K, _scales_and_minima, _pack_q4_k),
    Q6_K: _make_kernel(Q6_K, _two_scales, _pack_q6_k),
    INT4_32: _make_kernel(INT4_32, _make_one_scale(INT4_32, nearest_bf16), _make_pack_int4(INT4_32)),
    INT4_128: _make_kernel(INT4_128, _make_one_scale(INT4_128, nearest_bf16), _make_pack_int4(INT4_128)),
}

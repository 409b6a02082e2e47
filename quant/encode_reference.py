"""How weights become codes and scales, in plain NumPy: the judge of quant/kernels/encode.py, byte by byte.

Everything is float32 and happens in one order. Shapes: R rows and B blocks of 128 columns, padded; each block's row
holds P groups of `fmt.group` columns. Groups are [R, B, P, group], a value for each of them is [R, B, P], one for each
block's row [R, B, 1]; A anchors are tried. How much each column counts, c, is [1, B, P, group].
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.packed import BLOCK_K, HIGHEST_INTEGER, INTEGER_STEP, LOWEST_INTEGER, IntegerKind, PackedFormat
from quant.packing import Codes, bf16_of_float, float_of_bf16, padded_shape

Floats = NDArray[np.float32]

# Where the search begins: the group's largest value stands at one of these levels; scales may have either sign. Chosen
# one by one, each the best beside those before it, on Gaussian, Laplacian and (fast) Student's t weights.
ANCHORS = {
    "fast": (-8.2, -7.2, -8.8, -7.8, 6.8, -6.2, -8.4, -9.2),
    "accurate": (-128.0, 116.0, -108.0, -124.0, -136.0, 112.0, 92.0, -112.0, 120.0, -88.0, -132.0, -104.0),
    "q8": (127.0, 126.0, 125.0, 124.0, 123.0, 122.0, 121.0, 120.0),
}
# The d that are tried: the largest of a block row's scales over each of these.
TOP_INTEGERS: dict[IntegerKind, tuple[float, ...]] = {
    "odd4": (15.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0),
    "i6": (31.0, 30.0, 29.0, 28.0, 27.0, 26.0, 25.0, 24.0),
}
# Of a block's row, so that no square overflows or vanishes.
SMALLEST_POWER, LARGEST_POWER = np.float32(2.0**-100), np.float32(2.0**100)
NEGLIGIBLE = np.float32(2.0**-60)  # a group whose values are all below this, once scaled, becomes zeros
NOTHING = np.float32(2.0**-20)  # a sum of squared levels below is that of zeros: columns count at least 2^-7
EXPONENT_BITS = 0x7F800000
ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)


class Rows(NamedTuple):
    """Weights divided by a power of two for each block's row: groups [R, B, P, group]; power [R, B, 1].

    columns: how much the error in each column counts, [1, B, P, group].
    """

    groups: Floats
    power: Floats
    columns: Floats


class Fits(NamedTuple):
    """The levels that each anchor gives to each group, [A, R, B, P].

    scale: the best one for these levels. squares: Σ c level²; a scale that is off by x adds x² times that to the error.
    gain: by how much levels and scale bring Σ c x² down.
    """

    scale: Floats
    squares: Floats
    gain: Floats


def quantise(weight: Floats, fmt: PackedFormat, columns: Floats | None = None) -> Codes:
    """The codes and scales of a finite matrix [N, K], padded to whole blocks with zeros.

    columns: how much the squared error in each column counts, [K], above 0; by default alike.
    """
    rows = _normalise(weight, fmt, np.ones(weight.shape[1], np.float32) if columns is None else columns)
    if fmt.integers is None:
        stored, d = _one_scale(rows, fmt)
        integers = np.ones_like(d)
    else:
        integers, first_d = _two_scales(rows, fmt, fmt.integers)
        stored, d = _refit(rows, integers, first_d, fmt)
    codes = _nearest_codes(rows.groups, _over(ONE, integers * d), fmt)
    return Codes(_matrix(codes), _matrix(integers.astype(np.int8)), _matrix(bf16_of_float(stored)))


def _normalise(weight: Floats, fmt: PackedFormat, columns: Floats) -> Rows:
    """Each block's row over 2^e, where 2^e <= max|w| < 2^(e + 1), but e within -100 .. 100. Filling counts as 1."""
    padded = np.zeros(padded_shape(weight.shape), np.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(padded.shape[0], -1, BLOCK_K)
    below = (np.abs(blocks).max(axis=2, keepdims=True).view(np.uint32) & EXPONENT_BITS).view(np.float32)
    power = np.clip(below, SMALLEST_POWER, LARGEST_POWER)
    counts: Floats = np.ones(padded.shape[1], np.float32)
    counts[: len(columns)] = columns
    groups = (blocks * (ONE / power)).reshape(*blocks.shape[:2], -1, fmt.group)
    return Rows(groups, power, counts.reshape(1, *groups.shape[1:]))


def _one_scale(rows: Rows, fmt: PackedFormat) -> tuple[Floats, Floats]:
    """The best d that puts a block row's largest value at an anchor: as stored, and over 2^e."""
    peak: Floats = np.abs(_peaks(rows.groups))
    best_stored, best, least = np.zeros_like(peak), np.zeros_like(peak), np.full_like(peak, INFINITY)
    for anchor in ANCHORS[fmt.name]:
        stored, d = _store(peak / np.float32(anchor), rows, largest_scale(fmt))
        error = _error(rows, d, fmt)
        better = error < least
        best_stored, best = np.where(better, stored, best_stored), np.where(better, d, best)
        least = np.where(better, error, least)
    return best_stored, best


def _two_scales(rows: Rows, fmt: PackedFormat, kind: IntegerKind) -> tuple[Floats, Floats]:
    """The integers of all groups, and the d (over 2^e), with the least error as far as the anchors' fits tell it."""
    fits = _fit_anchors(rows, fmt)
    first = fits.gain.argmax(axis=0)[None]
    top = np.abs(np.take_along_axis(fits.scale, first, axis=0)[0]).max(axis=2, keepdims=True)
    best, least = np.zeros_like(top), np.full_like(top, INFINITY)
    for integer in TOP_INTEGERS[kind]:
        _, d = _store(top / np.float32(integer), rows, largest_scale(fmt))
        cost = _sum(_cheapest_integers(fits, d, kind)[1])[..., None]
        best, least = np.where(cost < least, d, best), np.where(cost < least, cost, least)
    return _cheapest_integers(fits, best, kind)[0], best


def _fit_anchors(rows: Rows, fmt: PackedFormat) -> Fits:
    peak = _peaks(rows.groups)
    sums = [_fit(rows, _over(np.float32(anchor), peak), fmt) for anchor in ANCHORS[fmt.name]]
    products, squares = (np.stack(values) for values in zip(*sums, strict=True))
    scale = np.divide(products, np.where(squares < NOTHING, ONE, squares), dtype=np.float32)
    return Fits(scale, squares, scale * products)


def _cheapest_integers(fits: Fits, d: Floats, kind: IntegerKind) -> tuple[Floats, Floats]:
    """For each group the integer that is nearest to one of its fits, the best of them; and the error, less Σ x²."""
    integers = _nearest_integers(fits.scale, d, kind)
    off = integers * d - fits.scale
    cost = fits.squares * off * off - fits.gain
    cheapest = cost.argmin(axis=0)[None]
    chosen, least = (np.take_along_axis(values, cheapest, axis=0)[0] for values in (integers, cost))
    return chosen, least


def _nearest_integers(scale: Floats, d: Floats, kind: IntegerKind) -> Floats:
    lowest, step = np.float32(LOWEST_INTEGER[kind]), np.float32(INTEGER_STEP[kind])
    bounded = np.clip(scale * _over(ONE, d), lowest, np.float32(HIGHEST_INTEGER[kind]))
    return np.rint((bounded - lowest) * (ONE / step)) * step + lowest


def _refit(rows: Rows, integers: Floats, d: Floats, fmt: PackedFormat) -> tuple[Floats, Floats]:
    """The best d for these integers and the levels that are nearest with the d so far: as stored, and over 2^e."""
    products, squares = _fit(rows, _over(ONE, integers * d), fmt)
    numerator, denominator = _sum(integers * products), _sum(integers * integers * squares)
    return _store(_over(numerator, denominator)[..., None], rows, largest_scale(fmt))


def _store(scale: Floats, rows: Rows, largest: np.float32) -> tuple[Floats, Floats]:
    """A scale times 2^e as a bfloat16 holds it; and that over 2^e. Nothing decoded from it overflows; never below 0."""
    stored = float_of_bf16(bf16_of_float(np.clip(scale * rows.power, ZERO, largest))) + ZERO
    return stored, stored * (ONE / rows.power)


def largest_scale(fmt: PackedFormat) -> np.float32:
    """The largest bfloat16 whose product with every level and integer is finite."""
    most = np.float32(max(map(abs, fmt.levels)) if fmt.levels else fmt.zero)
    if fmt.integers is not None:
        most *= np.float32(-LOWEST_INTEGER[fmt.integers])
    quotient = np.array([np.finfo(np.float32).max / most], np.float32)
    return np.float32((quotient.view(np.uint32) & 0xFFFF0000).view(np.float32)[0])


def level_range(fmt: PackedFormat) -> tuple[np.float32, np.float32]:
    """The lowest and highest of evenly spaced levels; with 8 bits -128 is left out, so that both ends are alike."""
    return np.float32(-min(fmt.zero, 127)), np.float32(2**fmt.bits - 1 - fmt.zero)


def midpoints(fmt: PackedFormat) -> Floats:
    """Where one level ends to be the nearest and the next begins: float32 [levels - 1], exact."""
    levels = np.array(fmt.levels, np.float32)
    return (levels[1:] + levels[:-1]) / np.float32(2)


def _peaks(groups: Floats) -> Floats:
    """The value of largest magnitude of each group, the positive one of equals; 0 where it is negligible."""
    highest, lowest = groups.max(axis=3), groups.min(axis=3)
    peak = np.where(highest < -lowest, lowest, highest)
    return np.where(np.abs(peak) < NEGLIGIBLE, ZERO, peak)


def _over(numerator: np.float32 | Floats, divisor: Floats) -> Floats:
    """numerator / divisor, and 0 where the divisor is 0."""
    return np.divide(numerator, divisor, out=np.zeros_like(divisor), where=divisor != 0)


def _nearest_codes(groups: Floats, inverse: Floats, fmt: PackedFormat) -> NDArray[np.uint8]:
    """The codes whose levels are nearest to the group's values times `inverse`."""
    scaled = groups * inverse[..., None]
    if fmt.levels is not None:
        return np.searchsorted(midpoints(fmt), scaled).astype(np.uint8)
    return (np.rint(np.clip(scaled, *level_range(fmt))) + np.float32(fmt.zero)).astype(np.uint8)


def _nearest_levels(groups: Floats, inverse: Floats, fmt: PackedFormat) -> Floats:
    codes = _nearest_codes(groups, inverse, fmt)
    if fmt.levels is not None:
        return np.array(fmt.levels, np.float32)[codes]
    return codes.astype(np.float32) - np.float32(fmt.zero)


def _fit(rows: Rows, inverse: Floats, fmt: PackedFormat) -> tuple[Floats, Floats]:
    """Σ c level × x and Σ c level², with the levels nearest to the values times `inverse`."""
    levels = _nearest_levels(rows.groups, inverse, fmt)
    counted = levels * rows.columns
    return _sum(counted * rows.groups), _sum(counted * levels)


def _error(rows: Rows, scale: Floats, fmt: PackedFormat) -> Floats:
    """Σ c (x - level × scale)², with the nearest levels."""
    off = rows.groups - _nearest_levels(rows.groups, _over(ONE, scale), fmt) * scale[..., None]
    return _sum(off * rows.columns * off)


def _sum(values: Floats) -> Floats:
    """Σ over the last axis, added one after the other."""
    total = np.zeros(values.shape[:-1], np.float32)
    for k in range(values.shape[-1]):
        total += values[..., k]
    return total


def _matrix(values: NDArray[Any]) -> NDArray[Any]:
    """[R, B, ...] as a matrix with R rows."""
    return np.ascontiguousarray(values.reshape(values.shape[0], -1))

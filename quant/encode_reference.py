"""How weights become codes and scales, in plain NumPy: the judge of quant/kernels/encode.py, byte by byte.

Everything is float32 and happens in one order. Shapes: R rows and B blocks of 128 columns, padded; each block's row
holds P groups of `fmt.group` columns. Groups are [R, B, P, group], a value for each of them is [R, B, P].
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.packed import BLOCK_K, PackedFormat
from quant.packing import Codes, bf16_of_float, float_of_bf16, padded_shape

Floats = NDArray[np.float32]

# Where the search begins: the group's largest value stands at one of these levels; scales may have either sign. Chosen
# one by one, each the best beside those before it, on Gaussian and Laplacian weights. 52 instead of 12 gain 0.1 %.
ANCHORS = {
    "fast": (-8.2, 7.2, -7.8, -8.6, -9.0, 6.8, -8.4, 6.2),
    "accurate": (-128.0, 116.0, -108.0, -124.0, -136.0, 112.0, 92.0, -112.0, 120.0, -88.0, -132.0, -104.0),
    "q8": (127.0, 126.0, 125.0, 124.0, 123.0, 122.0, 121.0, 120.0),
}
# The largest of a block row's scales becomes one of these integers, times the row's own scale.
TOP_INTEGERS = (31.0, 30.0, 29.0, 28.0, 27.0, 26.0, 25.0, 24.0)
SMALLEST_INTEGER, LARGEST_INTEGER = np.float32(-32), np.float32(31)
# Of a block's row, so that no square overflows or vanishes.
SMALLEST_POWER, LARGEST_POWER = np.float32(2.0**-100), np.float32(2.0**100)
NEGLIGIBLE = np.float32(2.0**-60)  # a group whose values are all below this, once scaled, becomes zeros
EXPONENT_BITS = 0x7F800000
ONE, ZERO = np.float32(1), np.float32(0)


class Rows(NamedTuple):
    """Weights divided by a power of two for each block's row: groups [R, B, P, group]; power [R, B, 1]."""

    groups: Floats
    power: Floats


def quantise(weight: Floats, fmt: PackedFormat) -> Codes:
    """The codes and scales of a finite matrix [N, K], padded to whole blocks with zeros."""
    rows = _normalise(weight, fmt)
    return _quantise_two_scales(rows, fmt) if fmt.scale == "i6xbf16" else _quantise_groups(rows, fmt)


def _normalise(weight: Floats, fmt: PackedFormat) -> Rows:
    """Each block's row over 2^e, where 2^e <= max|w| < 2^(e + 1), but e within -100 .. 100."""
    padded = np.zeros(padded_shape(weight.shape), np.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(padded.shape[0], -1, BLOCK_K)
    below = (np.abs(blocks).max(axis=2, keepdims=True).view(np.uint32) & EXPONENT_BITS).view(np.float32)
    power = np.clip(below, SMALLEST_POWER, LARGEST_POWER)
    return Rows((blocks * (ONE / power)).reshape(*blocks.shape[:2], -1, fmt.group), power)


def _quantise_groups(rows: Rows, fmt: PackedFormat) -> Codes:
    """A bfloat16 for each group: the best of those that the anchors lead to."""
    peak = _peaks(rows.groups)
    best_stored, best, least = np.zeros_like(peak), np.zeros_like(peak), np.full_like(peak, np.inf)
    for anchor in ANCHORS[fmt.name]:
        products, squares = _fit(rows.groups, _over(np.float32(anchor), peak), fmt)
        stored, scale = _store(products / squares, rows, largest_scale(fmt))
        error = _error(rows.groups, scale, fmt)
        better = error < least
        best_stored, best = np.where(better, stored, best_stored), np.where(better, scale, best)
        least = np.where(better, error, least)
    codes = _nearest_codes(rows.groups, _over(ONE, best), fmt)
    return Codes(_matrix(codes), _matrix(bf16_of_float(best_stored)))


def _quantise_two_scales(rows: Rows, fmt: PackedFormat) -> Codes:
    """A bfloat16 d for each block's row and an integer s for each group, whose scale is s × d."""
    fitted, squares = _real_scales(rows.groups, fmt)
    stored, d = _block_scales(fitted, squares, rows, fmt)
    integers = _nearest_integers(fitted, d)
    codes = _nearest_codes(rows.groups, _over(ONE, integers * d), fmt)
    return Codes(_matrix(codes), _matrix(integers.astype(np.int8)), _matrix(bf16_of_float(stored)))


def _real_scales(groups: Floats, fmt: PackedFormat) -> tuple[Floats, Floats]:
    """The best scale of each group before it is rounded, and Σ level²: how the error grows with the scale's."""
    peak = _peaks(groups)
    fitted, curvature, most = np.zeros_like(peak), np.zeros_like(peak), np.full_like(peak, -1)
    for anchor in ANCHORS[fmt.name]:
        products, squares = _fit(groups, _over(np.float32(anchor), peak), fmt)
        scale = products / squares
        gain = scale * products  # by how much these levels bring Σ x² down
        better = most < gain
        fitted, curvature = np.where(better, scale, fitted), np.where(better, squares, curvature)
        most = np.where(better, gain, most)
    return np.where(peak == 0, ZERO, fitted), curvature


def _block_scales(fitted: Floats, squares: Floats, rows: Rows, fmt: PackedFormat) -> tuple[Floats, Floats]:
    """The d whose multiples are nearest to the groups' scales: as stored, and over 2^e. [R, B, 1]."""
    top = np.abs(fitted).max(axis=2, keepdims=True)
    best_stored, best, least = np.zeros_like(top), np.zeros_like(top), np.full_like(top, np.inf)
    for integer in TOP_INTEGERS:
        stored, d = _store(top / np.float32(integer), rows, largest_scale(fmt))
        off = _nearest_integers(fitted, d) * d - fitted
        cost = _dot(squares * off, off)[..., None]
        better = cost < least
        best_stored, best = np.where(better, stored, best_stored), np.where(better, d, best)
        least = np.where(better, cost, least)
    return best_stored, best


def _nearest_integers(scale: Floats, d: Floats) -> Floats:
    return np.rint(np.clip(scale * _over(ONE, d), SMALLEST_INTEGER, LARGEST_INTEGER))


def _store(scale: Floats, rows: Rows, largest: np.float32) -> tuple[Floats, Floats]:
    """A scale times 2^e as a bfloat16 holds it; and that over 2^e. Nothing decoded from it overflows; -0 becomes 0."""
    stored = float_of_bf16(bf16_of_float(np.clip(scale * rows.power, -largest, largest))) + ZERO
    return stored, stored * (ONE / rows.power)


def largest_scale(fmt: PackedFormat) -> np.float32:
    """The largest bfloat16 whose product with every level (and 6-bit integer) is finite."""
    most = np.float32(max(map(abs, fmt.levels)) if fmt.levels else fmt.zero)
    if fmt.scale == "i6xbf16":
        most *= -SMALLEST_INTEGER
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
    """The value of largest magnitude of each group, the first of equals; 0 where it is negligible."""
    at = np.abs(groups).argmax(axis=3)[..., None]
    peak = np.take_along_axis(groups, at, axis=3)[..., 0]
    return np.where(np.abs(peak) < NEGLIGIBLE, ZERO, peak)


def _over(numerator: np.float32, divisor: Floats) -> Floats:
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


def _fit(groups: Floats, inverse: Floats, fmt: PackedFormat) -> tuple[Floats, Floats]:
    """Σ level × x and Σ level² (at least 1): their quotient is the best scale for these levels."""
    levels = _nearest_levels(groups, inverse, fmt)
    return _dot(levels, groups), np.maximum(_dot(levels, levels), ONE)


def _error(groups: Floats, scale: Floats, fmt: PackedFormat) -> Floats:
    """Σ (x - level × scale)², with the nearest levels."""
    off = groups - _nearest_levels(groups, _over(ONE, scale), fmt) * scale[..., None]
    return _dot(off, off)


def _dot(a: Floats, b: Floats) -> Floats:
    """Σ a × b over the last axis, added one after the other."""
    total = np.zeros(a.shape[:-1], np.float32)
    for k in range(a.shape[-1]):
        total += a[..., k] * b[..., k]
    return total


def _matrix(values: NDArray[Any]) -> NDArray[Any]:
    """[R, B, ...] as a matrix with R rows."""
    return np.ascontiguousarray(values.reshape(values.shape[0], -1))

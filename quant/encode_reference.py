"""How weights become codes and scales, in plain NumPy: the judge of quant/kernels/encode.py, byte by byte.

Everything is float32 and happens in one order. Shapes: R rows and B blocks of 128 columns, padded; each block's row
holds P groups of `fmt.group` columns. Groups are [R, B, P, group], a value for each of them is [R, B, P].
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.packed import BLOCK_K, PackedFormat
from quant.packing import Codes, bf16_of_float, float_of_bf16, padded_shape

Floats = NDArray[np.float32]

# Where a search begins: the group's largest value stands at one of these levels. Either sign: scales have both.
ANCHORS = {
    "fast": (-8.0, 8.0, -7.5, 7.5, -7.0, 7.0, -8.6, 8.6, -6.4, 6.4),
    "accurate": (-127.0, 113.0, -117.0, 127.0, -107.0, 103.0, -140.0, 140.0, -95.0, 95.0),
    "q8": (127.0, 126.0, 125.0, 124.0),
}
# The largest of a block row's scales is one of these integers times the row's own scale.
TOP_INTEGERS = (31.0, 30.0, 29.0, 28.0, 27.0, 26.0, 25.0, 24.0)
SMALLEST_INTEGER, LARGEST_INTEGER = -32.0, 31.0
NEIGHBOURS = (0.0, -1.0, 1.0)  # of a group's nearest integer, tried in this order
LARGEST_EXPONENT = 100  # of a block row, so that no square overflows or vanishes
NEGLIGIBLE = np.float32(2.0**-60)  # a group so far below its block's row is stored as zeros
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Rows(NamedTuple):
    """Weights divided by a power of two for each block's row. groups [R, B, P, group]; up, down [R, B, 1]."""

    groups: Floats
    up: Floats
    down: Floats


def quantise(weight: Floats, fmt: PackedFormat) -> Codes:
    """The codes and scales of a finite matrix [N, K], float32, padded to whole blocks with zeros."""
    rows = normalise(weight, fmt)
    return _quantise_two_scales(rows, fmt) if fmt.scale == "i6xbf16" else _quantise_groups(rows, fmt)


def normalise(weight: Floats, fmt: PackedFormat) -> Rows:
    """Each block's row over 2^e, where 2^e <= max|w| < 2^(e + 1), but e within -100 .. 100."""
    shape = padded_shape(weight.shape)
    padded = np.zeros(shape, np.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(shape[0], -1, BLOCK_K)
    biased = np.abs(blocks).max(axis=2).view(np.int32) >> 23
    exponent = np.clip(biased - 127, -LARGEST_EXPONENT, LARGEST_EXPONENT)[..., None]
    up, down = (((127 + sign * exponent) << 23).astype(np.int32).view(np.float32) for sign in (1, -1))
    groups = (blocks * down).reshape(*blocks.shape[:2], -1, fmt.group)
    return Rows(groups, up, down)


def _quantise_groups(rows: Rows, fmt: PackedFormat) -> Codes:
    """A bfloat16 for each group: the best of those that the anchors lead to."""
    peak = _peaks(rows.groups)
    codes = _codes_at(rows.groups, np.zeros_like(peak), fmt)
    scales, least = np.zeros_like(peak), np.full_like(peak, np.inf)
    for anchor in ANCHORS[fmt.name]:
        levels = level_values(_codes_at(rows.groups, _over(np.float32(anchor), peak), fmt), fmt)
        fitted = _dot(levels, rows.groups) / np.maximum(_dot(levels, levels), np.float32(1))
        stored, scale = _store(fitted, rows, largest_scale(fmt))
        tried = _codes_at(rows.groups, _over(np.float32(1), scale), fmt)
        error = _error(rows.groups, tried, scale, fmt)
        better = error < least
        scales, least = np.where(better, stored, scales), np.where(better, error, least)
        codes = np.where(better[..., None], tried, codes)
    return Codes(_flat(codes), _flat(bf16_of_float(scales)))


def _quantise_two_scales(rows: Rows, fmt: PackedFormat) -> Codes:
    """A bfloat16 d for each block's row and an integer s for each group, whose scale is s times d."""
    fitted, curvature = _real_scales(rows.groups, fmt)
    stored, d = _block_scales(fitted, curvature, rows, fmt)
    nearest = _nearest_integer(fitted, d)
    codes = _codes_at(rows.groups, np.zeros_like(fitted), fmt)
    integers, least = np.zeros_like(fitted), np.full_like(fitted, np.inf)
    for step in NEIGHBOURS:
        integer = np.clip(nearest + np.float32(step), SMALLEST_INTEGER, LARGEST_INTEGER)
        tried = _codes_at(rows.groups, _over(np.float32(1), integer * d), fmt)
        error = _error(rows.groups, tried, integer * d, fmt)
        better = error < least
        integers, least = np.where(better, integer, integers), np.where(better, error, least)
        codes = np.where(better[..., None], tried, codes)
    return Codes(_flat(codes), _flat(integers.astype(np.int8)), _flat(bf16_of_float(stored)))


def _real_scales(groups: Floats, fmt: PackedFormat) -> tuple[Floats, Floats]:
    """The best scale of each group before it is rounded, and how the error grows when it is changed: Σ level²."""
    peak = _peaks(groups)
    most = np.full_like(peak, -1)
    fitted, curvature = np.zeros_like(peak), np.zeros_like(peak)
    for anchor in ANCHORS[fmt.name]:
        levels = level_values(_codes_at(groups, _over(np.float32(anchor), peak), fmt), fmt)
        products, squares = _dot(levels, groups), np.maximum(_dot(levels, levels), np.float32(1))
        scale = products / squares
        gain = scale * products  # what the error loses when all zeros become these levels
        better = gain > most
        most, fitted, curvature = (
            np.where(better, new, old) for new, old in ((gain, most), (scale, fitted), (squares, curvature))
        )
    return np.where(peak == 0, np.float32(0), fitted), curvature


def _block_scales(fitted: Floats, curvature: Floats, rows: Rows, fmt: PackedFormat) -> tuple[Floats, Floats]:
    """The d that rounding the groups' scales to its multiples costs least: as stored, and over 2^e. [R, B, 1]."""
    top = np.abs(fitted).max(axis=2, keepdims=True)
    best_stored, best, least = np.zeros_like(top), np.zeros_like(top), np.full_like(top, np.inf)
    for integer in TOP_INTEGERS:
        stored, d = _store(top / np.float32(integer), rows, largest_scale(fmt))
        off = _nearest_integer(fitted, d) * d - fitted
        cost = _dot(curvature * off, off)[..., None]
        better = cost < least
        best_stored, best = np.where(better, stored, best_stored), np.where(better, d, best)
        least = np.where(better, cost, least)
    return best_stored, best


def _nearest_integer(scale: Floats, d: Floats) -> Floats:
    return np.rint(np.clip(scale * _over(np.float32(1), d), np.float32(SMALLEST_INTEGER), np.float32(LARGEST_INTEGER)))


def _store(scale: Floats, rows: Rows, largest: np.float32) -> tuple[Floats, Floats]:
    """A scale as a bfloat16 holds it, times 2^e; and without it. Nothing decoded from it may overflow; -0 is 0."""
    with np.errstate(over="ignore", under="ignore"):
        times = np.clip(scale * rows.up, -largest, largest)
    stored = float_of_bf16(bf16_of_float(times)) + np.float32(0)
    return stored, stored * rows.down


def largest_scale(fmt: PackedFormat) -> np.float32:
    """The largest bfloat16 whose product with every level (and 6-bit integer) is finite."""
    most = max(abs(level) for level in fmt.levels) if fmt.levels else fmt.zero
    if fmt.scale == "i6xbf16":
        most *= -int(SMALLEST_INTEGER)
    bits = np.float32(FLOAT32_MAX / most).view(np.uint32) & np.uint32(0xFFFF0000)
    return np.uint32(bits).view(np.float32)


def _peaks(groups: Floats) -> Floats:
    """The value of largest magnitude of each group, the first of equals; 0 where it is negligible."""
    at = np.abs(groups).argmax(axis=3)[..., None]
    peak = np.take_along_axis(groups, at, axis=3)[..., 0]
    return np.where(np.abs(peak) < NEGLIGIBLE, np.float32(0), peak)


def _over(numerator: np.float32, divisor: Floats) -> Floats:
    """numerator / divisor, and 0 where the divisor is 0."""
    return np.divide(numerator, divisor, out=np.zeros_like(divisor), where=divisor != 0)


def _codes_at(groups: Floats, inverse: Floats, fmt: PackedFormat) -> NDArray[np.uint8]:
    """The codes whose levels are nearest to the group's values times `inverse`; the lower of two as near."""
    scaled = groups * inverse[..., None]
    if fmt.levels is None:
        lowest, highest = level_range(fmt)
        return (np.rint(np.clip(scaled, lowest, highest)) + np.float32(fmt.zero)).astype(np.uint8)
    return np.searchsorted(midpoints(fmt), scaled).astype(np.uint8)


def level_range(fmt: PackedFormat) -> tuple[np.float32, np.float32]:
    """The lowest and highest level of evenly spaced ones; 8 bits leave out -128, so that both ends are alike."""
    return np.float32(-min(fmt.zero, 127)), np.float32(2**fmt.bits - 1 - fmt.zero)


def midpoints(fmt: PackedFormat) -> Floats:
    """Where one level ends to be the nearest and the next begins: float32 [levels - 1], exact."""
    levels = np.array(fmt.levels, np.float32)
    return (levels[1:] + levels[:-1]) / np.float32(2)


def level_values(codes: NDArray[np.uint8], fmt: PackedFormat) -> Floats:
    if fmt.levels is not None:
        return np.array(fmt.levels, np.float32)[codes]
    return codes.astype(np.float32) - np.float32(fmt.zero)


def _error(groups: Floats, codes: NDArray[np.uint8], scale: Floats, fmt: PackedFormat) -> Floats:
    off = groups - level_values(codes, fmt) * scale[..., None]
    return _dot(off, off)


def _dot(a: Floats, b: Floats) -> Floats:
    """Σ a × b over the last axis, added one after the other."""
    total = np.zeros(a.shape[:-1], np.float32)
    for k in range(a.shape[-1]):
        total += a[..., k] * b[..., k]
    return total


def _flat(values: NDArray) -> NDArray:
    """[R, B, ...] as a matrix [R, ...] of contiguous rows."""
    return np.ascontiguousarray(values.reshape(values.shape[0], -1))

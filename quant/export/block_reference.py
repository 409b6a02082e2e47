"""How weights become blocks of GGUF and of compressed-tensors, in plain NumPy.

It is the judge of quant/export/block_kernels.py, byte by byte. Everything is float32 and happens in one order. B blocks
are encoded at once, [B, n]; P groups of a super block are [B, P, n / P], and a value for each of them [B, P]. Errors
are squared and count alike for all weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quant.export.block_types import INT4_32, INT4_128, Q4_0, Q4_K, Q5_0, Q6_K, Q8_0, BlockType
from quant.packing import bf16_of_float, float_of_bf16

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Halves = NDArray[np.float16]

# Where a search begins: the value of largest magnitude stands at one of these levels; scales may have either sign.
FOUR_BITS = (-8.2, -7.2, -8.8, -7.8, 6.8, -6.2, -8.4, -9.2)
ANCHORS = {
    "Q4_0": FOUR_BITS,
    "INT4_32": FOUR_BITS,
    "INT4_128": FOUR_BITS,
    "Q5_0": (-16.3, -15.2, -17.2, -14.4, 15.2, 14.4, -15.8, -16.8),
    "Q6_K": (-32.2, -31.2, -33.2, 30.8, 30.0, -30.2),
    "Q4_K": (15.0, 14.2, 15.8, 13.4, 14.6, 15.4, 12.6, 16.4),  # of the range from the least value (or 0) to the largest
}
LEVELS = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-127, 127), "Q6_K": (-32, 31), "Q4_K": (0, 15)}
LEVELS |= {"INT4_32": LEVELS["Q4_0"], "INT4_128": LEVELS["Q4_0"]}
MOST_SCALE, MOST_INTEGER = 63, -128  # of Q4_K's 6 bits; of Q6_K's 8, which its largest scale gets
GROUPS = {"Q4_K": 8, "Q6_K": 16}  # of a super block
LARGEST_HALF = np.float32(65504)
SMALLEST_NORMAL = np.float32(2.0**-14)  # half precision; below this its values are multiples of 2^-24
SPLIT = np.float32(2**13 + 1)
HALF, ZERO, ONE = np.float32(0.5), np.float32(0), np.float32(1)


class Sums(NamedTuple):
    """What a fit of levels l to values x needs, over the last axis."""

    levels: Floats  # Σ l
    squares: Floats  # Σ l²
    products: Floats  # Σ l x


def encode(values: Floats, kind: BlockType) -> Bytes:
    """Finite float32 [B, kind.block], at most 2^18 in magnitude, as uint8 [B, kind.block_bytes]."""
    return ENCODERS[kind](values)


def nearest_half(value: Floats) -> Floats:
    """The values of half precision that are nearest, as float32; beyond its range its largest."""
    bounded = np.clip(value, -LARGEST_HALF, LARGEST_HALF)
    large = bounded * SPLIT
    size = np.abs(bounded)
    small = np.copysign((size + HALF) - HALF, bounded)
    return np.where(size < SMALLEST_NORMAL, small, large - (large - bounded)) + ZERO


def over(numerator: Floats | np.float32, divisor: Floats) -> Floats:
    """numerator / divisor, and 0 where the divisor is 0."""
    return np.divide(numerator, divisor, out=np.zeros_like(divisor), where=divisor != 0)


def sums(levels: Floats, values: Floats) -> Sums:
    return Sums(total(levels), total(levels * levels), total(levels * values))


def total(values: Floats) -> Floats:
    """Σ over the last axis, added one after the other."""
    result = np.zeros(values.shape[:-1], np.float32)
    for k in range(values.shape[-1]):
        result += values[..., k]
    return result


def signed_levels(values: Floats, inverse: Floats, name: str) -> Floats:
    """The levels nearest to values × inverse. inverse: one for the last axis of values."""
    lowest, highest = LEVELS[name]
    return np.rint(np.clip(values * inverse[..., None], np.float32(lowest), np.float32(highest)))


def peaks(values: Floats) -> Floats:
    """The value of largest magnitude along the last axis, the positive one of equals."""
    highest, lowest = values.max(axis=-1), values.min(axis=-1)
    return np.where(highest < -lowest, lowest, highest)


def best_scale(values: Floats, name: str) -> Floats:
    """The scale that fits best with the levels that one of the anchors gives."""
    peak = peaks(values)
    best, most = np.zeros_like(peak), np.full_like(peak, -1)
    for anchor in ANCHORS[name]:
        fit = sums(signed_levels(values, over(np.float32(anchor), peak), name), values)
        scale = fit.products / np.maximum(fit.squares, ONE)
        gain = scale * fit.products
        best, most = np.where(most < gain, scale, best), np.where(most < gain, gain, most)
    return best


# One scale


def one_scale(values: Floats, name: str, nearest: Callable[[Floats], Floats] = nearest_half) -> tuple[Floats, Floats]:
    """Scales [B], and levels [B, n]: the best fit, and once more the best scale for its levels.

    nearest: to the scales that there are.
    """
    first = nearest(best_scale(values, name))
    fit = sums(signed_levels(values, over(ONE, first), name), values)
    scale = nearest(over(fit.products, fit.squares))
    return scale, signed_levels(values, over(ONE, scale), name)


def _encode_q4_0(values: Floats) -> Bytes:
    scale, levels = one_scale(values, "Q4_0")
    return _joined(_half_bytes(scale), _halves_together((levels + 8).astype(np.uint8)))


def _encode_q5_0(values: Floats) -> Bytes:
    scale, levels = one_scale(values, "Q5_0")
    codes = (levels + 16).astype(np.uint8)
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little")
    return _joined(_half_bytes(scale), fifth, _halves_together(codes & np.uint8(15)))


def nearest_bf16(value: Floats) -> Floats:
    return float_of_bf16(bf16_of_float(value)) + ZERO


def _encode_int4(values: Floats) -> Bytes:
    """The scale, and codes from the lowest bits of 32 on."""
    scale, levels = one_scale(values, f"INT4_{values.shape[1]}", nearest_bf16)
    codes = (levels + 8).astype(np.uint8)
    bits = bf16_of_float(scale).astype("<u2")[:, None].view(np.uint8)
    return _joined(bits, codes[:, 0::2] | codes[:, 1::2] << np.uint8(4))


def _encode_q8_0(values: Floats) -> Bytes:
    scale = nearest_half(np.abs(peaks(values)) * np.float32(1 / 127))
    levels = signed_levels(values, over(ONE, scale), "Q8_0")
    return _joined(_half_bytes(scale), levels.astype(np.int8).view(np.uint8))


# Q6_K: level × scale of 8 bits × scale of half precision


def _encode_q6_k(values: Floats) -> Bytes:
    groups = values.reshape(len(values), GROUPS["Q6_K"], -1)
    scale, integers, levels = two_scales(groups)
    codes = (levels + 32).astype(np.uint8).reshape(len(values), 2, 4, 32)
    low, high = codes & np.uint8(15), codes >> 4
    lower = low[:, :, :2] | low[:, :, 2:] << np.uint8(4)
    upper = high[:, :, 0] | high[:, :, 1] << np.uint8(2) | high[:, :, 2] << np.uint8(4) | high[:, :, 3] << np.uint8(6)
    return _joined(lower, upper, integers.astype(np.int8).view(np.uint8), _half_bytes(scale))


def two_scales(groups: Floats) -> tuple[Floats, Floats, Floats]:
    """d [B], each group's integer [B, P], and levels [B, P, n]: the best fit of each group, then the best d for all."""
    fits = best_scale(groups, "Q6_K")
    first = nearest_half(peaks(fits) * np.float32(1 / MOST_INTEGER))[:, None]
    integers = np.rint(np.clip(fits * over(ONE, first), np.float32(-128), np.float32(127)))
    fit = sums(signed_levels(groups, over(ONE, integers * first), "Q6_K"), groups)
    d = nearest_half(over(total(integers * fit.products), total(integers * integers * fit.squares)))
    return d, integers, signed_levels(groups, over(ONE, integers * d[:, None]), "Q6_K")


# Q4_K: level × scale - minimum, both of 6 bits times one of half precision


def _encode_q4_k(values: Floats) -> Bytes:
    groups = values.reshape(len(values), GROUPS["Q4_K"], -1)
    d, dmin, scales, minima = scales_and_minima(groups)
    levels = offset_levels(groups, over(ONE, scales * d[:, None]), minima * dmin[:, None])
    codes = levels.astype(np.uint8).reshape(len(values), 4, 2, 32)
    packed = codes[:, :, 0] | codes[:, :, 1] << np.uint8(4)
    integers = _six_bits(scales.astype(np.uint8), minima.astype(np.uint8))
    return _joined(_half_bytes(d), _half_bytes(dmin), integers, packed)


def scales_and_minima(groups: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """d and dmin [B], and each group's two integers [B, P]."""
    scale, minimum = best_line(groups)
    d = nearest_half(scale.max(axis=1) * np.float32(1 / MOST_SCALE))[:, None]
    dmin = nearest_half(minimum.max(axis=1) * np.float32(1 / MOST_SCALE))[:, None]
    scales, minima = six_bits(scale * over(ONE, d)), six_bits(minimum * over(ONE, dmin))
    levels = offset_levels(groups, over(ONE, scales * d), minima * dmin)
    # with these levels, the minimum that is best for the rounded scale
    off = (scales * d) * total(levels) - total(groups)
    minima = six_bits(off * np.float32(1 / groups.shape[-1]) * over(ONE, dmin))
    d, dmin = refit(groups, d, dmin, scales, minima)
    return d[:, 0], dmin[:, 0], scales, minima


def best_line(groups: Floats) -> tuple[Floats, Floats]:
    """Scale and minimum, 0 or more, of the line that fits best, with the levels that one of the anchors gives."""
    lowest = np.minimum(groups.min(axis=-1), ZERO)
    span, count = groups.max(axis=-1) - lowest, np.float32(groups.shape[-1])
    sum_x = total(groups)
    best, minimum, most = np.zeros_like(span), -lowest, np.full_like(span, -1)
    for anchor in ANCHORS["Q4_K"]:
        fit = sums(offset_levels(groups, over(np.float32(anchor), span), -lowest), groups)
        scale, offset = line(fit, sum_x, count)
        gain = scale * fit.products + offset * sum_x
        better = most < gain
        best, minimum = np.where(better, scale, best), np.where(better, -offset, minimum)
        most = np.where(better, gain, most)
    return np.maximum(best, ZERO), minimum + ZERO


def line(fit: Sums, sum_x: Floats, count: np.float32) -> tuple[Floats, Floats]:
    """Scale and offset, 0 or less, with the least Σ (level × scale + offset - x)²."""
    determinant = count * fit.squares - fit.levels * fit.levels
    scale = over(count * fit.products - sum_x * fit.levels, determinant)
    offset = over(fit.squares * sum_x - fit.levels * fit.products, determinant)
    through_zero = ~(offset < ZERO)
    return (
        np.where(through_zero, over(fit.products, fit.squares), scale),
        np.where(through_zero, ZERO, offset),
    )


def refit(groups: Floats, d: Floats, dmin: Floats, scales: Floats, minima: Floats) -> tuple[Floats, Floats]:
    """The best d and dmin [B, 1] for these integers and the levels that are nearest with those so far."""
    count = np.float32(groups.shape[-1])
    fit = sums(offset_levels(groups, over(ONE, scales * d), minima * dmin), groups)
    aa, ax = total(scales * scales * fit.squares), total(scales * fit.products)
    ab, bx = total(scales * minima * fit.levels), total(minima * total(groups))
    bb = total(minima * minima) * count
    determinant = aa * bb - ab * ab
    new_d, new_min = over(ax * bb - ab * bx, determinant), over(ab * ax - aa * bx, determinant)
    usable = (determinant > ZERO) & (new_d > ZERO) & (new_min > ZERO)
    new_d, new_min = nearest_half(new_d)[:, None], nearest_half(new_min)[:, None]
    return np.where(usable[:, None], new_d, d), np.where(usable[:, None], new_min, dmin)


def offset_levels(groups: Floats, inverse: Floats, minimum: Floats) -> Floats:
    """The levels nearest to (values + minimum) × inverse."""
    return np.rint(np.clip((groups + minimum[..., None]) * inverse[..., None], ZERO, np.float32(15)))


def six_bits(values: Floats) -> Floats:
    return np.rint(np.clip(values, ZERO, np.float32(MOST_SCALE)))


def _six_bits(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight scales and eight minima in 12 bytes: the last four of each are cut into 4 and 2 bits."""
    early = np.concatenate([scales[:, :4], minima[:, :4]], axis=1)
    late = np.concatenate([scales[:, 4:], minima[:, 4:]], axis=1)
    lower = late[:, :4] & np.uint8(15) | (late[:, 4:] & np.uint8(15)) << np.uint8(4)
    return np.concatenate([early | late >> 4 << np.uint8(6), lower], axis=1)


# Bytes


def _half_bytes(values: Floats) -> Bytes:
    return values.astype("<f2")[:, None].view(np.uint8)


def _halves_together(codes: Bytes) -> Bytes:
    """Codes of 4 bits: those of the first half of a block low, those of the second high."""
    half = codes.shape[1] // 2
    return codes[:, :half] | codes[:, half:] << np.uint8(4)


def _joined(*parts: NDArray[Any]) -> Bytes:
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


ENCODERS: dict[BlockType, Callable[[Floats], Bytes]] = {
    Q4_0: _encode_q4_0,
    Q5_0: _encode_q5_0,
    Q8_0: _encode_q8_0,
    Q4_K: _encode_q4_k,
    Q6_K: _encode_q6_k,
    INT4_32: _encode_int4,
    INT4_128: _encode_int4,
}

"""What the kernels compute, in plain NumPy: in float64, or for packed weights bit by bit."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quant.formats import FP8_BLOCK_SIDE
from quant.packed import BLOCK_K, ExpertRecord, PackedFormat
from quant.packing import Bytes, float_of_bf16, levels_of, unpack

Array = NDArray[np.float64]


def decode_fp8(data: NDArray[np.uint8]) -> Array:
    """Values of E4M3 bytes: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f and 0xff are NaN."""
    exponent, mantissa = (data >> 3 & 15).astype(np.float64), (data & 7).astype(np.float64)
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size[(data & 0x7F) == 0x7F] = np.nan
    return np.where(data & 0x80, -size, size)


def decode_bf16(data: NDArray[np.uint16]) -> Array:
    """Values of bfloat16 bits: the upper half of a float32."""
    return (data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def dequantize_fp8(data: NDArray[np.uint8], scale: NDArray[np.float32]) -> Array:
    """A matrix [N, K] of E4M3 bytes times the scales of its 128x128 blocks."""
    spread = scale.astype(np.float64).repeat(FP8_BLOCK_SIDE, 0).repeat(FP8_BLOCK_SIDE, 1)
    return decode_fp8(data) * spread[: data.shape[0], : data.shape[1]]


def linear(x: NDArray[np.float32], weight: Array) -> Array:
    """x [T, K] times weight [N, K]: [T, N]."""
    return x.astype(np.float64) @ weight.T


def expert(x: Array, w1: Array, w3: Array, w2: Array) -> Array:
    """One expert: w2 (silu(w1 x) * (w3 x)). x: [T, dim], w1, w3: [inter, dim], w2: [dim, inter]; [T, dim]."""
    gate = x @ w1.T
    with np.errstate(over="ignore"):
        silu = gate / (1 + np.exp(-gate))
    return (silu * (x @ w3.T)) @ w2.T


def moe_experts(
    x: NDArray[np.float32],
    topk_ids: NDArray[np.int64],
    topk_weights: NDArray[np.float32],
    experts: list[tuple[Array, Array, Array]],
) -> Array:
    """Sum over each token's experts of weight * expert(x), in ascending order of expert id. x: [T, dim]; [T, dim]."""
    out = np.zeros(x.shape)
    for index, weights in enumerate(experts):
        tokens, slots = np.nonzero(topk_ids == index)
        y = expert(x[tokens].astype(np.float64), *weights)
        np.add.at(out, tokens, topk_weights[tokens, slots, None].astype(np.float64) * y)
    return out


def quantise_activations(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """x [T, K] in blocks of 128 (docs/formats.md): q [T, blocks, 128], filled up with zeros, and scales [T, blocks].

    Where 127 / max|x| overflows, the largest float32 takes its place. q is 0 where it would be no number.
    """
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK_K))).reshape(len(x), -1, BLOCK_K)
    largest = np.abs(padded).max(axis=2)
    with np.errstate(all="ignore"):
        inverse = np.minimum(np.float32(127) / largest, np.finfo(np.float32).max)
        q = np.rint(padded * inverse[:, :, None])
    return np.where(np.isnan(q), 0, q).astype(np.int8), largest / np.float32(127)


def multiply_add(
    a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32], fused: bool
) -> NDArray[np.float32]:
    """a * b + c, rounded once if `fused`, else twice.

    Once: the float64 sum is rounded to odd, by its error, so that rounding it to float32 is as if it were exact.
    """
    if not fused:
        return a * b + c
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    is_even = total.view(np.int64) & 1 == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & is_even, odd, total).astype(np.float32)


def packed_linear(
    x: NDArray[np.float32], data: Bytes, fmt: PackedFormat, shape: tuple[int, int], fused: bool = True
) -> NDArray[np.float32]:
    """x [T, K] times a packed weight of `shape` [N, K], bit by bit as docs/formats.md says: [T, N].

    `fused`: as on processors with fused multiply-adds.
    """
    q, x_scales = quantise_activations(x)
    stored = unpack(data, fmt, shape)
    d = float_of_bf16(stored.block_scales)
    whole = levels_of(stored.codes, fmt) * stored.integers.astype(np.int64).repeat(fmt.group, axis=1)
    sums = np.einsum("tbk,nbk->tnb", q.astype(np.int64), whole.reshape(len(whole), -1, BLOCK_K))
    out = np.zeros(sums.shape[:2], np.float32)
    for block in range(sums.shape[2]):
        both = d[None, :, block] * x_scales[:, block, None]
        out = multiply_add(sums[:, :, block].astype(np.float32), both, out, fused)
    return out[:, : shape[0]]


def packed_moe_experts(
    x: NDArray[np.float32],
    topk_ids: NDArray[np.int64],
    topk_weights: NDArray[np.float32],
    records: Bytes,
    record: ExpertRecord,
    silu: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    fused: bool = True,
) -> NDArray[np.float32]:
    """What `moe_experts` is, from records uint8 [E, bytes], rounded like packed_linear; sums of experts in float32."""
    out, wide = np.zeros_like(x), (record.inter_dim, record.dim)
    for index, data in enumerate(records):
        tokens, slots = np.nonzero(topk_ids == index)
        if not tokens.size:
            continue
        end = record.w2 + record.down_format.nbytes(wide[::-1])
        w1, w3, w2 = data[: record.w3], data[record.w3 : record.w2], data[record.w2 : end]
        gate, up = (packed_linear(x[tokens], matrix, record.format, wide, fused) for matrix in (w1, w3))
        y = packed_linear(silu(gate) * up, w2, record.down_format, wide[::-1], fused)
        np.add.at(out, tokens, topk_weights[tokens, slots, None] * y)
    return out

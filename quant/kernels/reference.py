"""What the kernels compute, in plain NumPy and float64."""

import numpy as np
from numpy.typing import NDArray

from quant.formats import FP8_BLOCK_SIDE

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

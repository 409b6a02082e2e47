"""FP8 as DeepSeek publishes it: E4M3 values and one float32 multiplier per block of 128x128.

Blocks are counted from the top left; the last one of a row or column may be shorter. Source: `weight_scale_inv`
in DeepSeek-V3's README_WEIGHTS.md.
"""

import numpy as np
import torch
import torch.nn.functional as F

from quant.formats import FP8_BLOCK, FP8_BLOCK_SIDE, QuantTensor, spread_blocks

E4M3_MAX = 448.0


def encode(weight: torch.Tensor) -> QuantTensor:
    """Quantise a matrix so that the largest value of each block becomes 448. weight: [N, K] of a float dtype.

    Raises ValueError for another rank and for NaN or infinity, which would spoil a whole block.
    """
    if weight.ndim != 2:
        raise ValueError(f"FP8 blocks cover matrices, and this tensor has the shape {tuple(weight.shape)}")
    values = weight.float()
    if not values.isfinite().all():
        raise ValueError("the weight holds NaN or infinity, so its FP8 scales cannot be computed")
    scale = _block_amax(values) / E4M3_MAX
    # A block of zeros (or of values whose scale underflows) divides by 1 and stays as it is.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    shape = (weight.shape[0], weight.shape[1])
    scaled = (values / spread_blocks(scale, shape, FP8_BLOCK)).clamp(-E4M3_MAX, E4M3_MAX)
    return QuantTensor(FP8_BLOCK, shape, scaled.to(FP8_BLOCK.dtype), scale)


def _block_amax(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each block. values: [N, K]; result: [ceil(N / 128), ceil(K / 128)]."""
    rows, columns = values.shape
    side = FP8_BLOCK_SIDE
    padded = F.pad(values.abs(), (0, -columns % side, 0, -rows % side))
    return padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side).amax((1, 3))


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """The float32 value of each E4M3 code, by bit arithmetic: the reference that kernels are compared to.

    codes: uint8 of any shape; sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7f and 0xff are NaN.
    """
    sign = np.where(codes & 0x80, np.float32(-1), np.float32(1))
    exponent = (codes >> 3 & 0xF).astype(np.uint32)
    mantissa = (codes & 0x7).astype(np.uint32)
    normal = (exponent + (127 - 7) << 23 | mantissa << 20).view(np.float32)
    subnormal = mantissa.astype(np.float32) * np.float32(2**-9)
    magnitude = np.where(exponent == 0, subnormal, normal)
    return np.where((codes & 0x7F) == 0x7F, np.float32(np.nan), sign * magnitude)

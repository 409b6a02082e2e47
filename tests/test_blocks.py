"""Encoders of GGUF's blocks and of int4 groups: kernels against plain NumPy, and both against the gguf package."""

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quant.export.block_reference import encode, nearest_half
from quant.export.block_types import (
    ENCODED,
    F16,
    INT4_32,
    INT4_128,
    Q4_0,
    Q4_K,
    Q5_0,
    Q6_K,
    Q8_0,
    BlockType,
    fitting,
)
from quant.export.blocks import LARGEST, encode_blocks

Floats = NDArray[np.float32]
GGUF_TYPES = tuple(kind for kind in ENCODED if kind.number is not None)


def awkward_blocks(kind: BlockType, seed: int, count: int = 53) -> Floats:
    """Blocks [count, kind.block] of heavy-tailed values, and all that is special about some; no multiple of 16."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(3, (count, kind.block)) * 0.02).astype(np.float32)
    x[0], x[1], x[2] = 0, 0.25, -0.5
    x[3], x[4] = np.abs(x[3]), -np.abs(x[4])  # no minimum below 0, no maximum above
    x[5, 1:], x[6, ::2] = 0, 0
    for row, factor in enumerate((1e-30, 1e-12, 1e-7, 1e-5, 1e-4, 1e3), start=7):
        x[row] *= np.float32(factor)  # scales vanish, are subnormal in half precision, are large
    x[13] = np.rint(x[13] * 100)  # ties
    x[14], x[14, 0] = -1e-6, LARGEST
    return x


def decoded(blocks: NDArray[np.uint8], kind: BlockType) -> Floats:
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind.number))


def error(x: Floats, y: Floats) -> float:
    """Σ (y - x)² over Σ x²."""
    return float(((y - x) ** 2).sum(dtype=np.float64) / (x**2).sum(dtype=np.float64))


@pytest.mark.parametrize("kind", ENCODED, ids=lambda kind: kind.name)
def test_the_kernel_writes_the_bytes_of_the_reference(kind: BlockType) -> None:
    for seed in range(3):
        x = awkward_blocks(kind, seed)
        written = encode_blocks(torch.from_numpy(x), kind).numpy().reshape(len(x), -1)
        different = np.flatnonzero((written != encode(x, kind)).any(axis=1))
        assert not different.size, f"blocks {different} of seed {seed}"


# Of Gaussian weights; llama.cpp's own quantiser, same tensor: Q4_0 0.00742, Q5_0 0.00183, Q8_0 0.0000288, Q4_K 0.00510,
# Q6_K 0.000316 (docs/export.md).
BOUNDS = {Q4_0: 0.00668, Q5_0: 0.00165, Q8_0: 0.0000292, Q4_K: 0.00516, Q6_K: 0.000295}


@pytest.mark.parametrize("kind", GGUF_TYPES, ids=lambda kind: kind.name)
def test_errors_are_as_documented(kind: BlockType) -> None:
    x = np.random.default_rng(1).standard_normal((256, 1024)).astype(np.float32) * np.float32(0.02)
    y = decoded(encode_blocks(torch.from_numpy(x), kind).numpy().reshape(256, -1), kind)
    assert BOUNDS[kind] * 0.95 < error(x, y) < BOUNDS[kind]


@pytest.mark.parametrize("kind", [Q4_0, Q5_0, Q8_0], ids=lambda kind: kind.name)
def test_no_worse_than_the_gguf_package(kind: BlockType) -> None:
    """Which does as llama.cpp: it has no encoder of its own for K formats."""
    x = (np.random.default_rng(2).standard_t(4, (64, 512)) * 0.02).astype(np.float32)
    theirs = gguf.quantize(x, gguf.GGMLQuantizationType(kind.number))
    ours = encode_blocks(torch.from_numpy(x), kind).numpy().reshape(64, -1)
    assert error(x, decoded(ours, kind)) < error(x, decoded(theirs, kind))


@pytest.mark.parametrize("kind", [INT4_32, INT4_128], ids=lambda kind: kind.name)
def test_int4_groups_by_hand(kind: BlockType) -> None:
    levels = np.resize(np.arange(-8, 8), (2, kind.block)).astype(np.float32)
    levels[1] *= -0.25  # 2 with the sign of the scale
    blocks = encode_blocks(torch.from_numpy(levels * 3), kind).numpy().reshape(2, -1)
    scales = (blocks[:, :2].copy().view("<u2").astype(np.uint32) << 16).view(np.float32)
    codes = np.stack([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=2).reshape(2, -1).astype(np.float32)
    assert scales[:, 0].tolist() == [3.0, -0.75]
    np.testing.assert_array_equal((codes - 8) * scales, levels * 3)


@pytest.mark.parametrize("kind", GGUF_TYPES, ids=lambda kind: kind.name)
def test_what_a_type_holds_is_kept(kind: BlockType) -> None:
    """Blocks that are a scale times levels, both ends among them."""
    rng = np.random.default_rng(3)
    most = {Q4_0: 8, Q5_0: 16, Q8_0: 127, Q4_K: 15, Q6_K: 32}[kind]
    low = 0 if kind is Q4_K else -most + (kind is Q8_0)
    levels = rng.integers(low, most, (32, kind.block)).astype(np.float32)
    levels[:, ::16] = low if kind is not Q8_0 else -127
    levels[:, 1::16] = 15 if kind is Q4_K else levels[:, 1::16]
    x = levels * np.float32(2.0**-7) * (63 if kind is Q4_K else 1)
    y = decoded(encode_blocks(torch.from_numpy(x), kind).numpy().reshape(32, -1), kind)
    np.testing.assert_allclose(y, x, rtol=0, atol=1e-3 * np.abs(x).max())


def test_half_precision_is_the_nearest() -> None:
    rng = np.random.default_rng(4)
    x = np.exp(rng.uniform(-20, 12, 20000)).astype(np.float32) * rng.choice([-1, 1], 20000).astype(np.float32)
    ours, theirs = nearest_half(x), np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(ours.astype(np.float16).astype(np.float32), ours)
    np.testing.assert_array_equal(np.abs(ours - np.clip(x, -65504, 65504)), np.abs(theirs - np.clip(x, -65504, 65504)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2 * LARGEST])
def test_what_is_no_weight_is_refused(value: float) -> None:
    x = torch.ones(4, 32)
    x[2, 5] = value
    with pytest.raises(ValueError, match="Q4_0"):
        encode_blocks(x, Q4_0)


def test_any_number_of_threads_writes_the_same(one_kernel_thread: None) -> None:
    from quant.kernels import set_threads

    x = torch.from_numpy(awkward_blocks(Q4_K, 5, count=333))
    alone = encode_blocks(x, Q4_K)
    set_threads(2)
    assert torch.equal(encode_blocks(x, Q4_K), alone)


def test_types_that_do_not_divide_a_row() -> None:
    assert [fitting(Q4_K, columns) for columns in (512, 64, 48)] == [Q4_K, Q5_0, F16]
    assert [fitting(Q6_K, columns) for columns in (256, 96, 40)] == [Q6_K, Q8_0, F16]
    assert [fitting(Q4_0, columns) for columns in (32, 33)] == [Q4_0, F16]

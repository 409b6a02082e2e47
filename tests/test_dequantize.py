"""Packed matrices as float32: the kernel against the layout's plain reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from quant.dequantize import dequantize
from quant.formats import QuantTensor
from quant.kernels.threads import set_threads, thread_count
from quant.packed import PACKED_FORMATS
from quant.packing import decode


def random_blocks(name: str, shape: tuple[int, int], seed: int) -> QuantTensor:
    """Any bytes are codes and integers; d is kept finite."""
    fmt = PACKED_FORMATS[name]
    blocks = np.random.default_rng(seed).integers(0, 256, (fmt.nbytes(shape) // fmt.block_bytes, fmt.block_bytes))
    blocks[:, 3:64:4] &= 0xBF
    return QuantTensor(fmt, shape, torch.from_numpy(blocks.astype(np.uint8).reshape(-1)))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(PACKED_FORMATS)), st.integers(1, 40), st.integers(1, 300), st.integers(0, 9))
def test_kernel_decodes_what_the_layout_says(name: str, rows: int, columns: int, seed: int) -> None:
    weight = random_blocks(name, (rows, columns), seed)
    expected = decode(weight.data.numpy(), PACKED_FORMATS[name], (rows, columns))
    assert np.array_equal(dequantize(weight).numpy(), expected)
    assert np.array_equal(weight.dequantize(torch.float32).numpy(), expected)


@pytest.mark.parametrize("name", PACKED_FORMATS)
def test_threads_change_nothing(name: str) -> None:
    weight, before = random_blocks(name, (1100, 1000), 1), thread_count()
    try:
        set_threads(1)
        alone = dequantize(weight)
        set_threads(2)
        assert torch.equal(dequantize(weight), alone)
    finally:
        set_threads(before)


def test_fake_tensors_pass_and_wrong_sizes_do_not() -> None:
    weight = random_blocks("fast", (17, 130), 0)
    with FakeTensorMode() as mode:
        fake = QuantTensor(weight.format, weight.shape, mode.from_tensor(weight.data))
        assert dequantize(fake).shape == (17, 130)
    with pytest.raises(ValueError, match="bytes as fast"):
        dequantize(QuantTensor(weight.format, (17, 400), weight.data))
    with pytest.raises(ValueError, match="no kernel decodes"):
        dequantize(QuantTensor(weight.format, weight.shape, weight.data.float()))

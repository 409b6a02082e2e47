import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.formats import FP8_BLOCK
from quant.fp8 import decode_e4m3, encode


def decode_slowly(code: int) -> float:
    """One E4M3 value, written as the format's definition."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if code & 0x80 else magnitude


def test_every_code_decodes_as_torch_and_the_definition_say() -> None:
    codes = np.arange(256, dtype=np.uint8)
    ours = decode_e4m3(codes)
    assert ours.dtype == np.float32
    torchs = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(ours, torchs)
    np.testing.assert_array_equal(np.signbit(ours[[0, 0x80]]), [False, True])
    np.testing.assert_array_equal(ours, np.array([decode_slowly(c) for c in range(256)], dtype=np.float32))


def test_codes_keep_their_shape() -> None:
    codes = np.array([[0x38, 0xB8], [0x7E, 0x01]], dtype=np.uint8)
    np.testing.assert_array_equal(decode_e4m3(codes), [[1, -1], [448, 2.0**-9]])


@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 99), bf16=st.booleans())
def test_encoding_keeps_each_value_within_half_a_step(rows: int, columns: int, seed: int, bf16: bool) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = weight.bfloat16() if bf16 else weight
    tensor = encode(weight)
    assert tensor.format is FP8_BLOCK and tensor.shape == (rows, columns)
    assert tensor.data.dtype == torch.float8_e4m3fn and tensor.scale is not None
    assert tensor.scale.dtype == torch.float32 and tensor.scale.shape == (-(-rows // 128), -(-columns // 128))
    step = tensor.scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns] * 2.0**-9
    error = (tensor.dequantize(torch.float32) - weight.float()).abs()
    # 3 bits of mantissa: half a step is 1/16 of a normal value, half of the smallest step below that.
    assert bool((error <= torch.maximum(weight.float().abs() / 16, step / 2) * 1.0001).all())


def test_each_block_has_its_own_scale() -> None:
    weight = torch.ones(130, 257)
    weight[128:, 256:] = 7.0
    weight[:128, 128:256] = -0.5
    tensor = encode(weight)
    assert tensor.scale is not None
    expected = torch.tensor([[1, 0.5, 1], [1, 1, 7]]) / 448
    torch.testing.assert_close(tensor.scale, expected)
    torch.testing.assert_close(tensor.dequantize(torch.float32), weight)
    assert tensor.nbytes == 130 * 257 + 6 * 4


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-44, 1e-38, 3e38])
def test_extreme_blocks_stay_finite(value: float) -> None:
    tensor = encode(torch.full((3, 130), value))
    decoded = tensor.dequantize(torch.float32)
    assert bool(decoded.isfinite().all()) and tensor.scale is not None and bool((tensor.scale > 0).all())
    torch.testing.assert_close(decoded, torch.full((3, 130), value), rtol=0.01, atol=1e-42)


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ValueError, match="matrices"):
        encode(torch.ones(4))
    with pytest.raises(ValueError, match="NaN"):
        encode(torch.tensor([[1.0, float("nan")]]))

"""Encoding: the kernel against its NumPy judge, and what the encoder promises of its results."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quant import encoding
from quant.encode_reference import quantise
from quant.encoding import encode
from quant.kernels import set_threads
from quant.packed import ACCURATE, FAST, PACKED_FORMATS, Q8, PackedFormat
from quant.packing import Codes, bf16_of_float, decode, float_of_bf16, pack, unpack
from tools.formats.fit_levels import GAUSS_16, fit, relative_error
from tools.formats.layer_error import Layer, layer_errors, quantise_activations

Floats = NDArray[np.float32]

ALL = sorted(PACKED_FORMATS.values(), key=lambda fmt: fmt.name)
each_format = pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
ROWS, COLUMNS = st.sampled_from((1, 15, 17, 33)), st.sampled_from((1, 96, 128, 160, 320, 416))
LARGEST = float(np.finfo(np.float32).max)

pytestmark = pytest.mark.usefixtures("one_kernel_thread")


def gaussian(shape: tuple[int, int], rng: np.random.Generator) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def single_outlier(shape: tuple[int, int], rng: np.random.Generator) -> Floats:
    values = gaussian(shape, rng) * np.float32(1e-3)
    values.ravel()[rng.integers(values.size)] = 100
    return values


def mixed_magnitudes(shape: tuple[int, int], rng: np.random.Generator) -> Floats:
    return np.ldexp(gaussian(shape, rng), rng.integers(-140, 120, shape).astype(np.int32)).astype(np.float32)


KINDS = {
    "gaussian": gaussian,
    "single outlier": single_outlier,
    "mixed magnitudes": mixed_magnitudes,
    "constant": lambda shape, rng: np.full(shape, rng.standard_normal(), np.float32),
    "zero": lambda shape, rng: np.zeros(shape, np.float32),
    "some zeros": lambda shape, rng: gaussian(shape, rng) * (rng.uniform(size=shape) < 0.05),
    "huge": lambda shape, rng: np.clip(gaussian(shape, rng), -1, 1) * np.float32(1e38),
    "largest": lambda shape, rng: np.sign(gaussian(shape, rng)) * np.float32(LARGEST),
    "subnormal": lambda shape, rng: gaussian(shape, rng) * np.float32(1e-40),
    "whole numbers": lambda shape, rng: rng.integers(-8, 8, shape).astype(np.float32),  # many ties
}


def encoded(values: Floats, fmt: PackedFormat) -> NDArray[np.uint8]:
    data: NDArray[np.uint8] = encode(torch.from_numpy(values), fmt).numpy()
    return data


def decoded(values: Floats, fmt: PackedFormat) -> Floats:
    return decode(encoded(values, fmt), fmt, values.shape)


def relative_rms(values: Floats, approximation: Floats) -> float:
    return float(np.sqrt(np.mean((values - approximation) ** 2) / np.mean(values**2)))


@given(st.sampled_from(ALL), st.sampled_from(sorted(KINDS)), ROWS, COLUMNS, st.integers(0, 99))
@settings(max_examples=25, deadline=None)
@example(ACCURATE, "largest", 17, 160, 0)
@example(ACCURATE, "subnormal", 17, 160, 0)
@example(ACCURATE, "mixed magnitudes", 33, 416, 0)
@example(FAST, "whole numbers", 33, 416, 0)
@example(FAST, "mixed magnitudes", 33, 416, 0)
def test_the_kernel_writes_the_bytes_of_the_reference(
    fmt: PackedFormat, kind: str, rows: int, columns: int, seed: int
) -> None:
    values = KINDS[kind]((rows, columns), np.random.default_rng(seed)).astype(np.float32)
    data = encoded(values, fmt)
    np.testing.assert_array_equal(data, pack(quantise(values, fmt), fmt))
    assert np.isfinite(decode(data, fmt, values.shape)).all()
    unpacked = unpack(data, fmt, values.shape)
    bf16 = unpacked.scales if unpacked.block_scales is None else unpacked.block_scales
    assert not (bf16 == 0x8000).any(), "zero is stored without a sign"
    assert unpacked.block_scales is None or not (unpacked.block_scales & 0x8000).any(), "d is positive"
    assert fmt is not Q8 or unpacked.codes.min() >= 1


@each_format
def test_zeros_and_filling(fmt: PackedFormat) -> None:
    values = np.zeros((17, 160), np.float32)
    values[0, 0] = 1
    quantised = unpack(encoded(values, fmt), fmt, values.shape)
    zero = 128 if fmt is Q8 else 8
    assert (quantised.codes[:, fmt.group :] == zero).all() and (quantised.codes[1:] == zero).all()
    assert quantised.scales[0, 0] != 0 and not quantised.scales[1:].any() and not quantised.scales[:, 1:].any()


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_strides(fmt: PackedFormat, dtype: torch.dtype) -> None:
    weight = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)).to(dtype).T
    assert torch.equal(encode(weight, fmt), encode(weight.float().contiguous(), fmt))


@each_format
def test_neither_threads_nor_strips_change_the_bytes(fmt: PackedFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(150, 200, generator=torch.Generator().manual_seed(0))
    whole = encode(weight, fmt)
    set_threads(2)
    assert torch.equal(encode(weight, fmt), whole)
    monkeypatch.setattr(encoding, "STRIP_WEIGHTS", 2 * 16 * 200 + 5)
    assert torch.equal(encode(weight, fmt), whole)


def test_what_cannot_be_encoded_is_refused() -> None:
    for weight in (torch.ones(4), torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="matrix"):
            encode(weight, FAST)
    for value in (float("nan"), float("inf"), -float("inf"), 1e39):
        weight = torch.ones(40, 130, dtype=torch.float64)
        weight[39, 129] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            encode(weight, FAST)


@each_format
def test_empty_matrices(fmt: PackedFormat) -> None:
    assert encode(torch.ones(0, 128), fmt).shape == encode(torch.ones(16, 0), fmt).shape == (0,)


def plain_rounding(values: Floats, fmt: PackedFormat) -> Floats:
    """What formats usually do: the group's largest value becomes the outermost level."""
    groups = values.reshape(-1, fmt.group)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    if fmt.levels is None:
        scale = float_of_bf16(bf16_of_float(peak / np.float32(-8 if fmt is FAST else 127)))
        lowest, highest = (-8, 7) if fmt is FAST else (-127, 127)
        return (np.clip(np.rint(groups / scale), lowest, highest) * scale).reshape(values.shape)
    scale = (peak / -127).reshape(-1, 8)
    d = float_of_bf16(bf16_of_float(np.abs(scale).max(axis=1, keepdims=True) / np.float32(31)))
    scale = (np.clip(np.rint(scale / d), -32, 31) * d).reshape(-1, 1)
    levels = np.array(fmt.levels, np.float32)
    nearest = levels[np.abs(groups[..., None] / np.where(scale == 0, 1, scale)[..., None] - levels).argmin(axis=2)]
    return (nearest * scale).reshape(values.shape)


@each_format
@pytest.mark.parametrize("kind", ["gaussian", "laplacian", "uniform", "heavy tails"])
def test_searching_beats_plain_rounding(fmt: PackedFormat, kind: str) -> None:
    rng = np.random.default_rng(0)
    draw = {"gaussian": rng.standard_normal, "laplacian": lambda size: rng.laplace(size=size)}
    draw |= {"uniform": lambda size: rng.uniform(-1, 1, size), "heavy tails": lambda size: rng.standard_t(2.5, size)}
    values = draw[kind]((32, 512)).astype(np.float32)
    ours, plain = relative_rms(values, decoded(values, fmt)), relative_rms(values, plain_rounding(values, fmt))
    assert ours < 0.98 * plain


@pytest.mark.parametrize(("fmt", "most"), [(FAST, 0.082), (ACCURATE, 0.0645), (Q8, 0.005)])
def test_error_on_gaussian_weights(fmt: PackedFormat, most: float) -> None:
    values = gaussian((128, 512), np.random.default_rng(0))
    assert 0.9 * most < relative_rms(values, decoded(values, fmt)) < most


def representable(fmt: PackedFormat, rng: np.random.Generator) -> Codes:
    """A matrix [32, 256] that a format holds exactly; every group reaches one of its outer levels."""
    codes = rng.integers(1, 2**fmt.bits, (32, 256), np.uint8)
    outer = (1, 255) if fmt is Q8 else (0, 15)
    codes[:, :: fmt.group] = rng.choice(outer, (32, 256 // fmt.group))
    bits = bf16_of_float(rng.standard_normal((32, 256 // fmt.group), dtype=np.float32))
    if fmt.scale == "bf16":
        return Codes(codes, bits)
    integers = rng.integers(-31, 32, (32, 16)).astype(np.int8)
    integers[:, ::8] = 31
    return Codes(codes, integers, bits[:, :2] & 0x7FFF)


@each_format
def test_values_that_a_format_can_hold_come_back(fmt: PackedFormat) -> None:
    values = decode(pack(representable(fmt, np.random.default_rng(1)), fmt), fmt, (32, 256))
    np.testing.assert_array_equal(decoded(values, fmt), values)


@each_format
def test_powers_of_two_change_nothing(fmt: PackedFormat) -> None:
    values = gaussian((16, 160), np.random.default_rng(0))
    once = decoded(values, fmt)
    for exponent in (-90, -1, 99):
        factor = np.float32(2.0**exponent)
        np.testing.assert_array_equal(decoded(values * factor, fmt), once * factor)


def test_a_layer_of_experts_stays_near_the_exact_one() -> None:
    errors = layer_errors(Layer(dim=512, inter=256, experts=4, tokens=4))
    assert 0.1 < errors["fast"] < 0.15 and 0.08 < errors["accurate"] < 0.125 and 0.005 < errors["q8"] < 0.02


def test_activations_are_whole_steps_of_their_groups_scale() -> None:
    x = np.zeros((1, 40), np.float32)
    x[0, :3], x[0, 39] = (12.7, -0.06, 0.04), 254
    np.testing.assert_allclose(quantise_activations(x)[0, [0, 1, 2, 39]], [12.7, -0.1, 0, 254], rtol=1e-6)


def test_the_levels_of_accurate_are_as_good_as_a_fit() -> None:
    rng = np.random.default_rng(0)
    fitted_to, fresh = (rng.standard_normal((2000, 16), dtype=np.float32) for _ in range(2))
    levels = fit(fitted_to, rounds=6)
    assert max(map(abs, levels)) == 127 and sorted(levels) == list(levels)
    assert 0.98 < relative_error(fresh, GAUSS_16) / relative_error(fresh, levels) < 1.02

"""Encoding: the kernel against its NumPy judge, and what the encoder promises of its results."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quant import encoding
from quant.encode_reference import quantise
from quant.encoding import Errors, column_weights, encode, encode_published
from quant.formats import BF16, FP8_BLOCK, Format, QuantTensor
from quant.kernels import set_threads
from quant.kernels.widen import SPARE_VALUES
from quant.packed import ACCURATE, FAST, PACKED_FORMATS, Q8, PackedFormat
from quant.packing import Codes, bf16_of_float, decode, float_of_bf16, pack, unpack
from quant.tensor_rows import Scratch, float_rows
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
    assert not (unpacked.block_scales & 0x8000).any(), "d has no sign, not even zero's"
    assert fmt is not Q8 or unpacked.codes.min() >= 1


@given(st.sampled_from(ALL), st.sampled_from(sorted(KINDS)), ROWS, COLUMNS, st.integers(0, 99))
@settings(max_examples=15, deadline=None)
@example(ACCURATE, "mixed magnitudes", 33, 416, 0)
@example(FAST, "whole numbers", 17, 160, 0)
def test_the_kernel_weighs_columns_as_the_reference(
    fmt: PackedFormat, kind: str, rows: int, columns: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = KINDS[kind]((rows, columns), rng).astype(np.float32)
    importance = torch.from_numpy(rng.exponential(size=columns).astype(np.float32) ** 3)
    data = encode(torch.from_numpy(values), fmt, importance).numpy()
    counts = column_weights(importance, columns).numpy()[:columns]
    np.testing.assert_array_equal(data, pack(quantise(values, fmt, counts), fmt))


@each_format
def test_importance_moves_errors_to_where_they_count_least(fmt: PackedFormat) -> None:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(gaussian((64, 512), rng))
    importance = torch.from_numpy(rng.exponential(size=512).astype(np.float32) ** 2)
    off = {}
    for name, given_importance in (("alike", None), ("weighed", importance)):
        data = encode(values, fmt, given_importance).numpy()
        off[name] = torch.from_numpy(decode(data, fmt, (64, 512))) - values
    weighed = {name: float((error.square() * importance).sum()) for name, error in off.items()}
    assert weighed["weighed"] < (0.97 if fmt is not Q8 else 1) * weighed["alike"]
    ones = encode(values, fmt, torch.full((512,), 3.0))
    assert torch.equal(ones, encode(values, fmt)), "columns that count alike change nothing"


@each_format
def test_errors_are_summed_on_the_way(fmt: PackedFormat) -> None:
    rng, found = np.random.default_rng(1), Errors()
    values, importance = gaussian((37, 300), rng) * 1e-3, rng.uniform(0.5, 2, 300).astype(np.float32)
    data = encode(torch.from_numpy(values), fmt, torch.from_numpy(importance), found).numpy()
    off = decode(data, fmt, values.shape).astype(np.float64) - values
    counts = column_weights(torch.from_numpy(importance), 300).numpy()[:300].astype(np.float64)
    squares = values.astype(np.float64) ** 2
    expected = [squares.sum(), (off**2).sum(), (squares * counts).sum(), (off**2 * counts).sum()]
    assert found.sums == pytest.approx(expected, rel=1e-4)


def test_importance_that_is_none() -> None:
    for importance in (torch.ones(3), torch.tensor([1.0, -1]), torch.tensor([1.0, torch.nan])):
        with pytest.raises(ValueError, match="importance"):
            encode(torch.ones(2, 2), FAST, importance)
    assert torch.equal(encode(torch.ones(2, 2), FAST, torch.zeros(2)), encode(torch.ones(2, 2), FAST))
    assert column_weights(torch.tensor([0.0, 1, 1e9]), 3)[:3].tolist() == [1 / 128, 1 / 128, pytest.approx(3)]


@each_format
def test_zeros_and_filling(fmt: PackedFormat) -> None:
    values = np.zeros((17, 160), np.float32)
    values[0, 0] = 1
    quantised = unpack(encoded(values, fmt), fmt, values.shape)
    code, integer = {"fast": (8, 1), "accurate": (8, 0), "q8": (128, 1)}[fmt.name]
    assert (quantised.codes[:, fmt.group :] == code).all() and (quantised.codes[1:] == code).all()
    assert (quantised.integers[1:] == integer).all() and (quantised.integers[:, 1:] == integer).all()
    assert quantised.block_scales[0, 0] and np.count_nonzero(quantised.block_scales) == 1
    assert decode(pack(quantised, fmt), fmt, values.shape)[0, 0] == pytest.approx(1, rel=0.01)


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
    """What formats usually do: the largest value becomes the outermost level, the largest scale the largest integer."""
    groups = values.reshape(len(values), -1, 128 // fmt.group, fmt.group)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(axis=3)[..., None], axis=3)
    levels = np.array(fmt.levels or range({"fast": -8, "q8": -127}[fmt.name], 2**fmt.bits - fmt.zero), np.float32)
    scale = peak / levels[0]
    integers = {"fast": np.arange(-15, 16, 2), "accurate": np.arange(-32, 32), "q8": np.array([-1, 1])}[fmt.name]
    d = float_of_bf16(bf16_of_float(np.abs(scale).max(axis=2, keepdims=True) / np.float32(integers[-1])))
    scale = integers[np.abs(scale / d - integers).argmin(axis=3)][..., None].astype(np.float32) * d
    above = np.searchsorted((levels[1:] + levels[:-1]) / 2, groups / np.where(scale == 0, np.float32(1), scale))
    return (levels[above] * scale).reshape(values.shape)


def llama_cpp_q4_0(values: Floats) -> Floats:
    """llama.cpp's Q4_0, also 4.5 bits a weight: groups of 32, d = largest / -8 in float16, nearest of -8..7."""
    groups = values.reshape(-1, 32)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    d = (peak / -8).astype(np.float16).astype(np.float32)
    return (np.clip(np.rint(groups / d), -8, 7) * d).reshape(values.shape)


@each_format
@pytest.mark.parametrize("kind", ["gaussian", "laplacian", "uniform", "heavy tails"])
def test_searching_beats_plain_rounding(fmt: PackedFormat, kind: str) -> None:
    rng = np.random.default_rng(0)
    draw = {"gaussian": rng.standard_normal, "laplacian": lambda size: rng.laplace(size=size)}
    draw |= {"uniform": lambda size: rng.uniform(-1, 1, size), "heavy tails": lambda size: rng.standard_t(2.5, size)}
    values = draw[kind]((32, 512)).astype(np.float32)
    ours, plain = relative_rms(values, decoded(values, fmt)), relative_rms(values, plain_rounding(values, fmt))
    assert ours < 0.98 * plain


@pytest.mark.parametrize(("fmt", "most"), [(FAST, 0.0834), (ACCURATE, 0.0637), (Q8, 0.00625)])
def test_error_on_gaussian_weights(fmt: PackedFormat, most: float) -> None:
    values = gaussian((128, 512), np.random.default_rng(0))
    assert 0.98 * most < relative_rms(values, decoded(values, fmt)) < most


@pytest.mark.parametrize("degrees", [4.0, 1e9])
def test_fast_beats_a_larger_common_format(degrees: float) -> None:
    """On heavy tails and on Gaussian weights."""
    values = np.random.default_rng(0).standard_t(degrees, (128, 1024)).astype(np.float32)
    assert relative_rms(values, decoded(values, FAST)) < 0.985 * relative_rms(values, llama_cpp_q4_0(values))


def test_the_search_for_fast_is_nearly_as_good_as_trying_everything() -> None:
    """Every integer for every group, with many d; but d is not computed anew in the end, which gains a little, too."""
    values = gaussian((64, 128), np.random.default_rng(2))
    groups, least = values.reshape(64, 4, 32), np.full(64, np.inf)
    for top in np.linspace(8, 20, 30):
        d = float_of_bf16(bf16_of_float(np.abs(values).max(axis=1) / np.float32(8 * top)))
        scales = np.arange(-15, 16, 2)[:, None, None, None] * d[:, None, None]
        off = groups - np.clip(np.rint(groups / scales), -8, 7) * scales
        least = np.minimum(least, (off * off).sum(axis=3).min(axis=0).sum(axis=1))
    assert np.sum((values - decoded(values, FAST)) ** 2) < 1.005 * least.sum()


def representable(fmt: PackedFormat, rng: np.random.Generator) -> Codes:
    """A matrix [32, 256] that a format holds exactly; every group reaches an outer level, every block an integer."""
    codes = rng.integers(1, 2**fmt.bits, (32, 256), np.uint8)
    codes[:, :: fmt.group] = rng.choice((1, 255) if fmt is Q8 else (0, 15), (32, 256 // fmt.group))
    groups = (32, 256 // fmt.group)
    integers = {
        "fast": 2 * rng.integers(-8, 8, groups) + 1,
        "accurate": rng.integers(-31, 32, groups),
        "q8": np.ones(groups),
    }[fmt.name].astype(np.int8)
    if fmt is not Q8:
        integers[:, :: 128 // fmt.group] = 15 if fmt is FAST else 31
    d = rng.uniform(0.01, 10, (32, 2)).astype(np.float32)
    return Codes(codes, integers, bf16_of_float(d))


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
    assert 0.12 < errors["fast"] < 0.15 and 0.09 < errors["accurate"] < 0.125 and 0.01 < errors["q8"] < 0.02


def test_activations_are_whole_steps_of_their_blocks_scale() -> None:
    x = np.zeros((1, 200), np.float32)
    x[0, :3], x[0, 127], x[0, 199] = (12.7, -0.06, 0.04), 1.26, 254
    seen = quantise_activations(x)
    np.testing.assert_allclose(seen[0, [0, 1, 2, 127, 199]], [12.7, -0.1, 0, 1.3, 254], rtol=1e-6)
    assert np.count_nonzero(seen) == 4


def test_the_levels_of_accurate_are_as_good_as_a_fit() -> None:
    rng = np.random.default_rng(0)
    fitted_to, fresh = (rng.standard_normal((2000, 16), dtype=np.float32) for _ in range(2))
    levels = fit(fitted_to, rounds=6)
    assert max(map(abs, levels)) == 127 and sorted(levels) == list(levels)
    assert 0.98 < relative_error(fresh, GAUSS_16) / relative_error(fresh, levels) < 1.02


@given(st.sampled_from((1, 128, 130)), st.sampled_from((1, 100, 128, 300)), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_published_rows_are_widened_exactly(rows: int, columns: int, seed: int) -> None:
    """All 256 codes of E4M3, NaN among them, and what lies behind the result is left alone beyond the spare values."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=rng).view(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=rng) * 1e-3
    for weight in (
        QuantTensor(FP8_BLOCK, (rows, columns), codes, scale),
        QuantTensor(BF16, (rows, columns), torch.randn(rows, columns, generator=rng).bfloat16()),
    ):
        scratch = Scratch()
        room = scratch.values(rows * columns + 64)
        room.fill_(7.0)
        values = float_rows(weight, scratch)
        assert torch.equal(values.nan_to_num(9e9), weight.dequantize(torch.float32).nan_to_num(9e9))
        assert (room[rows * columns + SPARE_VALUES :] == 7.0).all()


def published(fmt: Format, rows: int, columns: int, seed: int) -> QuantTensor:
    """Finite weights in FP8 or bfloat16, with scales that differ from block to block."""
    rng = torch.Generator().manual_seed(seed)
    if fmt is BF16:
        return QuantTensor(BF16, (rows, columns), torch.randn(rows, columns, generator=rng).bfloat16())
    codes = torch.randn(rows, columns, generator=rng).mul(50).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=rng) + 0.01
    return QuantTensor(FP8_BLOCK, (rows, columns), codes, scale)


@given(
    st.sampled_from(ALL),
    st.sampled_from((FP8_BLOCK, BF16)),
    st.integers(1, 300),
    st.integers(1, 400),
    st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
@example(FAST, FP8_BLOCK, 257, 300, 0)
@example(ACCURATE, FP8_BLOCK, 130, 129, 0)
def test_published_weights_are_packed_as_their_values_are(
    fmt: PackedFormat, source: Format, rows: int, columns: int, seed: int
) -> None:
    weight, found, expected = published(source, rows, columns, seed), Errors(), Errors()
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(seed))
    data = encode_published(weight, fmt, importance, found)
    assert torch.equal(data, encode(weight.dequantize(torch.float32), fmt, importance, expected))
    assert found.sums == pytest.approx(expected.sums, rel=1e-12)


@each_format
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (130, 150)])
def test_published_weights_that_are_not_finite_are_refused(fmt: PackedFormat, rows: int, columns: int) -> None:
    for value, source in ((float("nan"), FP8_BLOCK), (float("nan"), BF16), (-float("inf"), BF16)):
        weight = published(source, rows, columns, 0)
        weight.data[-1, -1] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            encode_published(weight, fmt, None, Errors())
    weight = published(FP8_BLOCK, rows, columns, 0)
    assert weight.scale is not None
    weight.scale[-1, -1] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode_published(weight, fmt, None, Errors())

"""Kernels for packed weights against their NumPy reference, bit by bit, and what they promise and refuse."""

import platform
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch._subclasses import FakeTensorMode

from quant import ops
from quant.formats import QuantTensor
from quant.isa import processor_has
from quant.kernels import reference, set_threads, thread_count
from quant.kernels.activations import SCALES, SUMS_16, SUMS_32, activation_bytes, quantise
from quant.kernels.silu import exp
from quant.kernels.threads import parts_for
from quant.packed import ACCURATE, FAST, PACKED_FORMATS, Q8, ExpertRecord, PackedFormat, blocks_per_row, tiles
from quant.packing import Codes, pack
from tests.test_kernels import routed, run_python

FORMATS = tuple(PACKED_FORMATS.values())
FUSED = processor_has("fma")
by_name = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)

pytestmark = pytest.mark.usefixtures("one_kernel_thread")


def random_packed(fmt: PackedFormat, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Any bytes, padding included, but scales that are finite: bfloat16 of both signs, 2**-13 to 2**-2."""
    blocks = rng.integers(0, 256, (tiles(shape) * blocks_per_row(shape), fmt.block_bytes), dtype=np.uint8)
    count = 16 if fmt is ACCURATE else 64
    exponents = rng.integers(114, 125, (len(blocks), count), dtype=np.uint16) << 7
    scales = exponents | rng.integers(0, 2, exponents.shape, dtype=np.uint16) << 15
    blocks[:, : 2 * count] = (scales | rng.integers(0, 128, scales.shape, dtype=np.uint16)).view(np.uint8)
    return blocks.reshape(-1)


def make_weight(fmt: PackedFormat, rows: int, columns: int, rng: np.random.Generator) -> QuantTensor:
    return QuantTensor(fmt, (rows, columns), torch.from_numpy(random_packed(fmt, (rows, columns), rng)))


def expected_linear(x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    assert isinstance(weight.format, PackedFormat)
    rows, columns = weight.shape
    out = reference.packed_linear(x.numpy(), weight.data.numpy(), weight.format, (rows, columns), FUSED)
    return torch.from_numpy(np.ascontiguousarray(out))


def silu(gate: NDArray[np.float32]) -> NDArray[np.float32]:
    """With the kernel's own exp, which test_kernels.py checks, so that results can be equal."""
    powers = [exp(value) for value in -gate.reshape(-1)]  # float32 each: Numba would take Python's floats as float64
    return gate / (np.float32(1) + np.array(powers, np.float32).reshape(gate.shape))


class Moe:
    """A layer of random packed experts, and calls of the operator for it."""

    def __init__(self, fmt: PackedFormat, experts: int, dim: int, inter: int, rng: np.random.Generator) -> None:
        self.record, shape = ExpertRecord(fmt, dim, inter), (inter, dim)
        parts = [[random_packed(fmt, s, rng) for s in (shape, shape, shape[::-1])] for _ in range(experts)]
        self.records = np.zeros((experts, self.record.nbytes), np.uint8)
        for row, matrices in zip(self.records, parts, strict=True):
            joined = np.concatenate(matrices)
            row[: len(joined)] = joined
        starts = np.array([self.record.w1, self.record.w3, self.record.w2])
        bases = self.records.ctypes.data + np.arange(experts) * self.record.nbytes
        self.table = torch.from_numpy(bases[:, None] + starts)

    def arguments(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> list[Any]:
        record = self.record
        sizes = ops.moe_scratch_sizes(x.shape[0], ids.shape[1], len(self.table), record.dim, record.inter_dim)
        order, scratch = torch.empty(sizes[0], dtype=torch.int64), torch.full((sizes[1],), torch.nan)
        out = torch.full_like(x, torch.nan)
        return [x, ids, weights, self.table, record.inter_dim, record.format.name, order, scratch, out]

    def run(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        args = self.arguments(x, ids, weights)
        torch.ops.dsr1.packed_moe_experts(*args)
        return args[-1]

    def expected(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        arrays = (x.numpy(), ids.numpy(), weights.numpy(), self.records, self.record)
        return torch.from_numpy(reference.packed_moe_experts(*arrays, silu, FUSED))


def quantised(x: NDArray[np.float32], offset: int) -> NDArray[np.uint8]:
    """Activation blocks uint8 [blocks, 192] of one token."""
    out = np.full(activation_bytes(len(x)), 255, np.uint8)
    _quantise(x.ctypes.data, len(x), offset, out.ctypes.data)
    return out.reshape(-1, 192)


@numba.njit
def _quantise(x, k, offset, out):  # type: ignore[no-untyped-def]
    quantise(x, k, offset, out)


def test_multiply_add_of_the_reference_rounds_once() -> None:
    a, c = np.array([1 + 2.0**-12], np.float32), np.array([-1 - 2.0**-11], np.float32)
    assert reference.multiply_add(a, a, c, fused=True)[0] == 2.0**-24
    assert reference.multiply_add(a, a, c, fused=False)[0] == 0
    # 1 + 2**-24 + 2**-60 is just above the middle of two float32; float64 would round it to that middle, then down
    small, one = np.array([2.0**-12 * (1 + 2.0**-18)], np.float32), np.ones(1, np.float32)
    assert reference.multiply_add(small, small, one, fused=True)[0] == np.float32(1 + 2.0**-23)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 300),
    st.sampled_from([1.0, 1e-30, 1e-38, 1e-42, 1e37]),
    st.sampled_from([8, 128]),
    st.integers(0, 2**32 - 1),
)
@example(64, 0.0, 8, 0)
def test_activations_are_quantised_as_in_numpy(k: int, size: float, offset: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(k) * size).astype(np.float32)
    x[rng.random(k) < 0.2] = 0
    x[: k // 2] = np.round(x[: k // 2] / np.float32(size or 1) * 4) * np.float32(size) / 2  # halves among them
    for place, value in ((k // 3, np.nan), (k // 2, np.inf)):
        if seed % 3 == 0:
            x[place] = value
    q, scales = reference.quantise_activations(x[None])
    blocks = quantised(x, offset)
    np.testing.assert_array_equal(blocks[:, :SCALES].reshape(-1).view(np.int8), q[0])
    np.testing.assert_array_equal(blocks[:, SCALES:SUMS_16].copy().view(np.float32).reshape(-1), scales[0])
    for columns, start, end in ((16, SUMS_16, SUMS_32), (32, SUMS_32, 192)):
        sums = -offset * q[0].reshape(-1, columns).astype(np.int64).sum(axis=1)
        np.testing.assert_array_equal(blocks[:, start:end].copy().view(np.int32).reshape(-1), sums)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 9),
    st.integers(1, 90),
    st.integers(1, 400),
    st.sampled_from([1.0, 1e4, 1e-6]),
    st.integers(0, 2**32 - 1),
)
@example(FAST, 1, 16, 128, 1.0, 0)
@example(ACCURATE, 4, 17, 129, 1.0, 0)
@example(Q8, 5, 80, 256, 1.0, 0)
def test_linear(fmt: PackedFormat, tokens: int, rows: int, columns: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = make_weight(fmt, rows, columns, rng)
    x = torch.from_numpy(rng.standard_normal((tokens, columns), dtype=np.float32)) * size
    out = ops.linear(x, weight)
    assert torch.equal(out, expected_linear(x, weight))
    exact = x.double() @ weight.dequantize(torch.float64).T
    assert (out - exact).square().sum() < 1e-3 * (
        x.abs().double() @ weight.dequantize(torch.float64).abs().T
    ).square().sum()


@by_name
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_are_exact(fmt: PackedFormat, sign: int) -> None:
    shape = (16, 128)
    codes = np.zeros(shape, np.uint8)  # -8, -127 and -128: the levels farthest from 0
    if fmt is ACCURATE:
        stored = Codes(codes, np.full((16, 8), -32, np.int8), np.full((16, 1), 0x3F80, np.uint16))
    else:
        stored = Codes(codes, np.full((16, 4), 0x3F80, np.uint16))
    weight = QuantTensor(fmt, shape, torch.from_numpy(pack(stored, fmt)))
    x = torch.full((5, 128), 127.0) * sign
    level, factor = {"fast": (-8, 1), "accurate": (-127, -32), "q8": (-128, 1)}[fmt.name]
    assert torch.equal(ops.linear(x, weight), torch.full((5, 16), 128.0 * 127 * sign * level * factor))


@by_name
def test_nan_and_infinity_reach_only_their_token(fmt: PackedFormat) -> None:
    weight = make_weight(fmt, 20, 200, np.random.default_rng(1))
    x = torch.randn(6, 200)
    clean = ops.linear(x, weight)
    x[1, 7], x[4, 199], x[5, 130] = torch.nan, torch.inf, -torch.inf
    out = ops.linear(x, weight)
    assert not out[[1, 4, 5]].isfinite().any()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])
    assert not ops.linear(x[1:2], weight).isfinite().any()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 200),
    st.integers(1, 150),
    st.integers(0, 2**32 - 1),
)
@example(FAST, 1, 8, 4, 256, 64, 0)
@example(ACCURATE, 12, 1, 1, 130, 33, 0)
@example(Q8, 7, 2, 2, 16, 161, 0)
def test_moe_experts(fmt: PackedFormat, tokens: int, experts: int, top_k: int, dim: int, inter: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = Moe(fmt, experts, dim, inter, rng)
    x, ids, weights = routed(tokens, experts, min(top_k, experts), dim, rng)
    assert torch.equal(layer.run(x, ids, weights), layer.expected(x, ids, weights))


def test_moe_experts_that_nobody_or_everybody_chose() -> None:
    rng = np.random.default_rng(3)
    layer = Moe(FAST, 7, 64, 32, rng)
    x, ids, weights = routed(30, 7, 2, 64, rng)
    ids[:, 0], ids[:, 1] = 6, 2
    in_order = layer.run(x, ids.flip(1), weights.flip(1))
    assert torch.equal(layer.run(x, ids, weights), in_order) and torch.equal(in_order, layer.expected(x, ids, weights))
    ids[:, 1] = 6  # the same expert twice
    assert torch.equal(layer.run(x, ids, weights), layer.expected(x, ids, weights))
    assert layer.run(x[:0], ids[:0], weights[:0]).shape == (0, 64)


@by_name
def test_results_do_not_depend_on_threads_or_on_the_run(fmt: PackedFormat) -> None:
    rng = np.random.default_rng(5)
    weight, layer = make_weight(fmt, 70, 520, rng), Moe(fmt, 5, 520, 70, rng)
    x, ids, weights = routed(130, 5, 2, 520, rng)  # more values than one thread quantises alone
    few = slice(0, 30)
    results = []
    for count in (1, 2, 3, 2):
        set_threads(count)
        assert parts_for(30 * 70 * 520) == thread_count()
        linear_out = torch.cat([ops.linear(x, weight), ops.linear(x[few], weight)])
        results.append((linear_out, layer.run(x, ids, weights), layer.run(x[few], ids[few], weights[few])))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@by_name
def test_a_token_alone_gets_the_same_bits_as_among_others(fmt: PackedFormat) -> None:
    rng = np.random.default_rng(6)
    weight, layer = make_weight(fmt, 70, 130, rng), Moe(fmt, 6, 130, 70, rng)
    x, ids, weights = routed(20, 6, 3, 130, rng)
    linear_out, moe_out = ops.linear(x, weight), layer.run(x, ids, weights)
    for size in (1, 2, 3, 7):
        part = slice(11, 11 + size)
        assert torch.equal(ops.linear(x[part], weight), linear_out[part])
        assert torch.equal(layer.run(x[part], ids[part], weights[part]), moe_out[part])


def test_linear_keeps_leading_dimensions_and_dtype() -> None:
    weight = make_weight(FAST, 12, 20, np.random.default_rng(0))
    x = torch.randn(2, 3, 20).bfloat16()
    out = ops.linear(x, weight)
    assert out.shape == (2, 3, 12) and out.dtype == torch.bfloat16
    assert torch.equal(out.reshape(6, 12), ops.linear(x.float().reshape(6, 20), weight).bfloat16())
    assert ops.linear(x[:, :0], weight).shape == (2, 0, 12)
    strided = torch.randn(20, 5).T
    assert torch.equal(ops.linear(strided, weight), ops.linear(strided.contiguous(), weight))


@pytest.mark.parametrize(
    ("x", "data", "name", "shape", "message"),
    [
        (torch.ones(1, 20), torch.zeros(1152, dtype=torch.uint8), "q5", (3, 20), "no kernel reads"),
        (torch.ones(1, 20), torch.zeros(1152, dtype=torch.int8), "fast", (3, 20), "contiguous uint8"),
        (torch.ones(1, 20), torch.zeros(2304, dtype=torch.uint8)[::2], "fast", (3, 20), "contiguous uint8"),
        (torch.ones(1, 20), torch.zeros(1151, dtype=torch.uint8), "fast", (3, 20), "takes 1152 bytes"),
        (torch.ones(1, 20), torch.zeros(1152, dtype=torch.uint8), "fast", (17, 20), "takes 2304 bytes"),
        (torch.ones(1, 0), torch.zeros(0, dtype=torch.uint8), "fast", (3, 0), "takes 0 bytes"),
        (torch.ones(1, 21), torch.zeros(1152, dtype=torch.uint8), "fast", (3, 20), "cannot be multiplied"),
        (torch.ones(20), torch.zeros(1152, dtype=torch.uint8), "fast", (3, 20), "cannot be multiplied"),
        (torch.ones(1, 20).int(), torch.zeros(1152, dtype=torch.uint8), "fast", (3, 20), "cannot be multiplied"),
    ],
)
def test_linear_refuses_what_it_cannot_read(
    x: torch.Tensor, data: torch.Tensor, name: str, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.dsr1.packed_linear(x, data, name, *shape)


@pytest.mark.parametrize("bad", [-1, 4, 2**62])
def test_moe_refuses_ids_out_of_range(bad: int) -> None:
    rng = np.random.default_rng(0)
    layer = Moe(FAST, 4, 16, 8, rng)
    x, ids, weights = routed(3, 4, 2, 16, rng)
    ids[2, 1] = bad
    with pytest.raises(IndexError, match=r"outside 0 \.\. 3"):
        layer.run(x, ids, weights)


def test_moe_refuses_what_it_cannot_read() -> None:
    rng = np.random.default_rng(0)
    layer = Moe(FAST, 4, 16, 8, rng)
    good = layer.arguments(*routed(3, 4, 2, 16, rng))
    bad = {0: good[0].double(), 1: good[1].int(), 3: good[3][:, :2].contiguous(), 4: 0, 5: "q5", 6: good[6][:5]}
    bad[7] = good[7][: (3 * 192 + 6 * 192) // 4]  # nothing left for a thread
    for position, value in bad.items():
        with pytest.raises(ValueError):
            torch.ops.dsr1.packed_moe_experts(*good[:position], value, *good[position + 1 :])


def test_fake_tensors_pass_and_misplaced_ones_do_not() -> None:
    with FakeTensorMode():
        data = torch.empty(FAST.nbytes((300, 200)), dtype=torch.uint8, device="cuda")
        weight = QuantTensor(FAST, (300, 200), data)
        out = ops.linear(torch.empty(2, 5, 200, dtype=torch.bfloat16, device="cuda"), weight)
        assert out.shape == (2, 5, 300) and out.dtype == torch.bfloat16 and out.device.type == "cuda"
        with pytest.raises(ValueError, match="both must be on one device"):
            ops.linear(torch.empty(1, 200), weight)


OTHER_PROCESSORS = {  # without VNNI, with it in registers of 256 bits, without AVX and fused multiply-adds
    "haswell": "+ssse3,+avx2,+f16c,+fma",
    "alderlake": "+ssse3,+avx2,+f16c,+fma,+avxvnni",
    "generic": "",
}


@pytest.mark.parametrize("name", OTHER_PROCESSORS)
def test_other_processors_get_the_bits_of_the_reference(name: str) -> None:
    features = OTHER_PROCESSORS[name]
    script = f"""
import numba, numpy as np
from quant.kernels import reference
from quant.kernels.activations import activation_bytes, quantise
from quant.kernels.packed_dot import make_packed_dot, offset_of
from quant.packed import ACCURATE, FAST, Q8
from tests.test_packed_kernels import random_packed

one_fast, four_accurate, one_q8 = make_packed_dot(FAST, 1), make_packed_dot(ACCURATE, 4), make_packed_dot(Q8, 1)

@numba.njit
def run(code, tile, x, k, offset, scratch, stride, out):
    for t in range(4):
        quantise(x + t * k * 4, k, offset, scratch + t * stride)
    four = (scratch, scratch + stride, scratch + 2 * stride, scratch + 3 * stride)
    if code == 0:
        one_fast(tile, four[:1], 3, out, 64)
    elif code == 1:
        four_accurate(tile, four, 3, out, 64)
    else:
        one_q8(tile, four[:1], 3, out, 64)

rng = np.random.default_rng(0)
x = rng.standard_normal((4, 300), dtype=np.float32)
stride = activation_bytes(300)
for code, (fmt, tokens) in enumerate([(FAST, 1), (ACCURATE, 4), (Q8, 1)]):
    data, scratch = random_packed(fmt, (16, 300), rng), np.empty(4 * stride, np.uint8)
    out = np.empty((4, 16), np.float32)
    run(code, data.ctypes.data, x.ctypes.data, 300, offset_of(fmt), scratch.ctypes.data, stride, out.ctypes.data)
    expected = reference.packed_linear(x, data, fmt, (16, 300), {"fma" in features})
    np.testing.assert_array_equal(out[:tokens], expected[:tokens], fmt.name)
"""
    if "x86" not in platform.machine().lower():
        pytest.skip("these are processors of x86")
    run_python(script, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)

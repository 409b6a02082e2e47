"""Kernels for packed weights against their NumPy reference, bit by bit, and what they promise and refuse.

Where the processor has AMX, experts and linears with 5 tokens or more go through its tiles, and fewer through vector
instructions; both ways are taken here for the same inputs and must give the same bits.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch._subclasses import FakeTensorMode

from offload.node_experts import split_records
from quant import ops
from quant.formats import QuantTensor
from quant.isa import has_tiles, processor_has
from quant.kernels import reference, set_threads, thread_count
from quant.kernels.activations import STARTS, input_bytes, inputs_at, k_blocks, offset_of, quantise_row, record_bytes
from quant.kernels.decode import PACKED_CODES
from quant.kernels.silu import silu_times
from quant.kernels.threads import parts_for
from quant.packed import ACCURATE, BLOCK_K, FAST, PACKED_FORMATS, Q8, ExpertRecord, PackedFormat, blocks_per_row, tiles
from quant.packing import Codes, pack, unpack, whole_weights
from tests.test_kernels import routed, run_python

FORMATS = tuple(PACKED_FORMATS.values())
FUSED = processor_has("fma")
WAYS = (False, True) if has_tiles() else (False,)  # whether tiles may be used
LINEAR_NMSE, LAYER_NMSE = 2e-4, 6e-4  # against float math: what 8-bit activations cost at most
sizes = st.sampled_from([1.0, 1e4, 1e-6])
by_name = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
by_way = pytest.mark.parametrize("with_tiles", WAYS, ids=lambda with_tiles: "tiles" if with_tiles else "vectors")

pytestmark = pytest.mark.usefixtures("one_kernel_thread")


@contextmanager
def granted(with_tiles: bool) -> Iterator[None]:
    """Kernels that are called within may use tiles, or may not."""
    with patch.object(ops, "has_tiles", lambda: with_tiles):
        yield


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to three threads on any machine, and all that there are for the smallest task."""
    monkeypatch.setattr("quant.kernels.threads.MAX_THREADS", 3)
    monkeypatch.setattr("quant.kernels.threads.SERIAL_MULTIPLICATIONS", 0)


def random_packed(fmt: PackedFormat, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Any codes and integers, padding included, and any d from 2**-13 to 2**-2, but one in eight is 0."""
    blocks = rng.integers(0, 256, (tiles(shape) * blocks_per_row(shape), fmt.block_bytes), dtype=np.uint8)
    d = rng.integers(114 << 7, 125 << 7, (len(blocks), 16), dtype=np.uint16)
    d[rng.random(d.shape) < 1 / 8] = 0
    set_scales(blocks, d)
    return blocks.reshape(-1)


def even_packed(fmt: PackedFormat, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Any codes and integers, with one d, such that products with N(0, 1) are near 1."""
    data = random_packed(fmt, shape, rng)
    size = np.square(whole_weights(unpack(data, fmt, shape), fmt).astype(np.float64)).mean() ** 0.5
    d = (np.array([1 / (size * shape[1] ** 0.5)], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    blocks = data.reshape(-1, fmt.block_bytes)
    set_scales(blocks, d)
    return data


def set_scales(blocks: NDArray[np.uint8], d: NDArray[np.uint16]) -> None:
    """Write the bits of each row's d into blocks [B, bytes of a block]."""
    blocks[:, :64].view("<u2")[:, 1::2] = d


def make_weight(
    fmt: PackedFormat, rows: int, columns: int, rng: np.random.Generator, make: Any = random_packed
) -> QuantTensor:
    return QuantTensor(fmt, (rows, columns), in_lines(make(fmt, (rows, columns), rng)))


def in_lines(data: NDArray[np.uint8]) -> torch.Tensor:
    """The bytes from the start of a cache line on, as in a store; NumPy's own memory begins anywhere."""
    return torch.from_numpy(data).clone()


def activations(tokens: int, columns: int, size: float, rng: np.random.Generator) -> torch.Tensor:
    """Gaussian ones times `size`; some whole blocks are 0."""
    x = rng.standard_normal((tokens, columns), dtype=np.float32) * np.float32(size)
    for start in range(0, columns, BLOCK_K):
        x[rng.random(tokens) < 0.1, start : start + BLOCK_K] = 0
    return torch.from_numpy(x)


def expected_linear(x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    assert isinstance(weight.format, PackedFormat)
    rows, columns = weight.shape
    out = reference.packed_linear(x.numpy(), weight.data.numpy(), weight.format, (rows, columns), FUSED)
    return torch.from_numpy(np.ascontiguousarray(out))


def nmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Squared error relative to the squares of what was expected."""
    return float((actual.double() - expected).square().sum() / expected.square().sum())


def silu(gate: NDArray[np.float32]) -> NDArray[np.float32]:
    """The kernel's own, whose exp test_kernels.py checks, so that results can be equal."""
    out = gate.reshape(-1).copy()
    _silu(out, np.ones_like(out))
    return out.reshape(gate.shape)


@numba.njit
def _silu(gates, ups):  # type: ignore[no-untyped-def]
    silu_times(gates, ups)


class Moe:
    """A layer of random packed experts, and calls of the operator for it."""

    def __init__(
        self,
        fmt: PackedFormat,
        experts: int,
        dim: int,
        inter: int,
        rng: np.random.Generator,
        make: Any = random_packed,
        down: PackedFormat | None = None,
    ) -> None:
        self.record, shape = ExpertRecord(fmt, dim, inter, down), (inter, dim)
        self.records = torch.zeros(experts, self.record.nbytes, dtype=torch.uint8)
        for row in self.records.numpy():
            w1, w3 = (make(fmt, shape, rng) for _ in range(2))
            joined = np.concatenate([w1, w3, make(self.record.down_format, shape[::-1], rng)])
            row[: len(joined)] = joined
        self.parts = [self.records]
        self.table = self.table_of(self.records)

    def table_of(self, records: torch.Tensor) -> torch.Tensor:
        bases = records.data_ptr() + torch.arange(len(records)) * self.record.nbytes
        return bases[:, None] + torch.tensor([self.record.w1, self.record.w3, self.record.w2])

    def split(self, nodes: int) -> None:
        """Pretend that nodes share the experts: each has a copy in which all rows of the others are NaN."""
        self.parts = []
        for share in split_records(self.record, nodes):
            part = torch.full_like(self.records, 255)
            for piece in share.pieces:
                own = slice(piece.begin, piece.begin + piece.nbytes)
                part[:, own] = self.records[:, own]
            self.parts.append(part)
        self.table = torch.cat([self.table_of(part) for part in self.parts])

    def arguments(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> list[Any]:
        record = self.record
        counts = ops.moe_scratch_sizes(x.shape[0], ids.shape[1], len(self.records), record.dim, record.inter_dim)
        order, scratch = torch.empty(counts[0], dtype=torch.int64), torch.full((counts[1],), torch.nan)
        out, nodes = torch.full_like(x, torch.nan), len(self.parts)
        return [x, ids, weights, self.table, record.inter_dim, record.format_name, nodes, order, scratch, out]

    def run(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        args = self.arguments(x, ids, weights)
        torch.ops.dsr1.packed_moe_experts(*args)
        return args[-1]

    def expected(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        arrays = (x.numpy(), ids.numpy(), weights.numpy(), self.records.numpy(), self.record)
        return torch.from_numpy(reference.packed_moe_experts(*arrays, silu, FUSED))

    def float_math(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The layer in float64, from dequantised weights and activations as they are."""
        record, wide = self.record, (self.record.inter_dim, self.record.dim)
        places = ((record.w1, wide), (record.w3, wide), (record.w2, wide[::-1]))
        experts = []
        for data in self.records:
            parts = [QuantTensor(record.format, s, data[at:][: record.format.nbytes(s)]) for at, s in places]
            w1, w3, w2 = (part.dequantize(torch.float64).numpy() for part in parts)
            experts.append((w1, w3, w2))
        return torch.from_numpy(reference.moe_experts(x.numpy(), ids.numpy(), weights.numpy(), experts))


def test_multiply_add_of_the_reference_rounds_once() -> None:
    a, c = np.array([1 + 2.0**-12], np.float32), np.array([-1 - 2.0**-11], np.float32)
    assert reference.multiply_add(a, a, c, fused=True)[0] == 2.0**-24
    assert reference.multiply_add(a, a, c, fused=False)[0] == 0
    # 1 + 2**-24 + 2**-60 is just above the middle of two float32; float64 would round it to that middle, then down
    small, one = np.array([2.0**-12 * (1 + 2.0**-18)], np.float32), np.ones(1, np.float32)
    assert reference.multiply_add(small, small, one, fused=True)[0] == np.float32(1 + 2.0**-23)


@numba.njit
def _quantise(x, address, rows, k, code):  # type: ignore[no-untyped-def]
    inputs = inputs_at(address, rows, k, code)
    for row in range(rows):
        quantise_row(inputs, row, x + row * k * 4)


def quantised(x: NDArray[np.float32], fmt: PackedFormat) -> tuple[NDArray[Any], ...]:
    """Of x [T, K]: q [T, blocks, 128], where the sums of groups start [T, blocks, groups], and scales [T, blocks]."""
    (rows, k), blocks = x.shape, k_blocks(x.shape[1])
    memory = np.full(input_bytes(rows, k), 255, np.uint8)
    _quantise(x.ctypes.data, memory.ctypes.data, rows, k, PACKED_CODES[fmt.name])
    records = memory[: rows * record_bytes(k)].reshape(rows, -1)
    q = records[:, : blocks * BLOCK_K].view(np.int8).reshape(rows, blocks, BLOCK_K)
    starts = records[:, blocks * BLOCK_K :][:, : 4 * STARTS * blocks].copy().view(np.int32).reshape(rows, blocks, -1)
    scales = memory[rows * record_bytes(k) :].view(np.float32).reshape(blocks, rows).T
    return q, starts[:, :, : BLOCK_K // fmt.group], scales


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 3),
    st.integers(1, 600),
    st.sampled_from([1.0, 1e-30, 1e-38, 1e-42, 1e37]),
    st.integers(0, 2**32 - 1),
)
@example(FAST, 1, 128, 0.0, 0)
def test_activations_are_quantised_as_in_numpy(fmt: PackedFormat, rows: int, k: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, k)) * size).astype(np.float32)
    x[rng.random((rows, k)) < 0.2] = 0
    x[:, : k // 2] = np.round(x[:, : k // 2] / np.float32(size or 1) * 4) * np.float32(size) / 2  # halves among them
    for place, value in ((k // 3, np.nan), (k // 2, np.inf)):
        if seed % 3 == 0:
            x[-1, place] = value
    expected, expected_scales = reference.quantise_activations(x)
    q, starts, scales = quantised(x, fmt)
    np.testing.assert_array_equal(q, expected)
    np.testing.assert_array_equal(scales, expected_scales)
    sums = expected.reshape(*starts.shape, fmt.group).astype(np.int64).sum(axis=3)
    np.testing.assert_array_equal(starts, -offset_of(fmt) * sums)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.one_of(st.integers(1, 9), st.integers(10, 300)),
    st.integers(1, 200),
    st.integers(1, 400),
    sizes,
    st.integers(0, 2**32 - 1),
)
@example(FAST, 1, 16, 128, 1.0, 0)
@example(ACCURATE, 4, 17, 129, 1.0, 0)
@example(Q8, 5, 80, 256, 1.0, 0)
@example(ACCURATE, 33, 144, 300, 1e4, 0)
def test_linear(fmt: PackedFormat, tokens: int, rows: int, columns: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, x = make_weight(fmt, rows, columns, rng), activations(tokens, columns, size, rng)
    expected = expected_linear(x, weight)
    for with_tiles in WAYS:
        with granted(with_tiles):
            assert torch.equal(ops.linear(x, weight), expected), f"with_tiles={with_tiles}"


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 300),
    st.integers(60, 200),
    st.integers(60, 400),
    sizes,
    st.integers(0, 2**32 - 1),
)
def test_a_product_is_near_float_math(
    fmt: PackedFormat, tokens: int, rows: int, columns: int, size: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight, x = make_weight(fmt, rows, columns, rng, even_packed), activations(tokens, columns, size, rng)
    x[0, 0] = size  # or all might be 0
    error = nmse(ops.linear(x, weight), x.double() @ weight.dequantize(torch.float64).T)
    assert error <= LINEAR_NMSE


@by_name
@by_way
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("integer", ["lowest", "odd"])
def test_the_largest_integers_are_exact(fmt: PackedFormat, with_tiles: bool, sign: int, integer: str) -> None:
    """The sums of a block that are farthest from 0, and such as no float32 holds: they are rounded once."""
    shape = (16, BLOCK_K)
    factor = {"fast": -15, "accurate": -32 if integer == "lowest" else -31, "q8": 1}[fmt.name]
    level = {"fast": -8, "accurate": -127, "q8": -128}[fmt.name]
    integers = np.full((16, BLOCK_K // fmt.group), factor, np.int8)
    stored = Codes(np.zeros(shape, np.uint8), integers, np.full((16, 1), 0x3F80, np.uint16))
    weight = QuantTensor(fmt, shape, in_lines(pack(stored, fmt)))
    x = torch.full((40, BLOCK_K), 127.0) * sign
    x[1:, 0] = torch.arange(39.0)
    sums = x.double().sum(1) * level * factor
    with granted(with_tiles):
        out = ops.linear(x, weight)
    assert torch.equal(out, sums.float()[:, None].expand(40, 16))  # scales are 1, and float64 to float32 rounds once
    if fmt is ACCURATE:
        assert sums.abs().max() == 127 * BLOCK_K * -level * -factor > 2**25
        assert integer == "lowest" or not torch.equal(sums.float().double(), sums)


@by_name
@by_way
def test_nan_and_infinity_reach_only_their_token(fmt: PackedFormat, with_tiles: bool) -> None:
    rng = np.random.default_rng(1)
    weight, layer = make_weight(fmt, 20, 200, rng), Moe(fmt, 3, 200, 150, rng)
    x, ids, weights = routed(20, 3, 2, 200, rng)
    bad, good = [1, 4, 15], [t for t in range(20) if t not in (1, 4, 15)]
    with granted(with_tiles):
        clean, clean_layer = ops.linear(x, weight), layer.run(x, ids, weights)
        x[1, 7], x[4, 199], x[15, 130] = torch.nan, torch.inf, -torch.inf
        out, out_layer = ops.linear(x, weight), layer.run(x, ids, weights)
        assert not ops.linear(x[1:2], weight).isfinite().any()
    for dirty, before in ((out, clean), (out_layer, clean_layer)):
        assert not dirty[bad].isfinite().any() and before.isfinite().all()
        assert torch.equal(dirty[good], before[good])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(FORMATS),
    st.one_of(st.integers(1, 12), st.integers(13, 300)),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 200),
    st.integers(1, 300),
    sizes,
    st.integers(0, 2**32 - 1),
)
@example(FAST, Q8, 1, 8, 4, 256, 64, 1.0, 0)
@example(ACCURATE, FAST, 12, 1, 1, 130, 33, 1.0, 0)
@example(Q8, ACCURATE, 7, 2, 2, 16, 161, 1.0, 0)
@example(ACCURATE, Q8, 70, 3, 2, 130, 140, 1e4, 0)
@example(FAST, ACCURATE, 300, 12, 4, 40, 200, 1e-6, 0)
def test_moe_experts(
    fmt: PackedFormat,
    down: PackedFormat,
    tokens: int,
    experts: int,
    top_k: int,
    dim: int,
    inter: int,
    size: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    layer = Moe(fmt, experts, dim, inter, rng, down=down)
    _, ids, weights = routed(tokens, experts, min(top_k, experts), dim, rng)
    x = activations(tokens, dim, size, rng)
    expected = layer.expected(x, ids, weights)
    for with_tiles in WAYS:
        with granted(with_tiles):
            assert torch.equal(layer.run(x, ids, weights), expected), f"with_tiles={with_tiles}"


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 100),
    st.integers(4, 8),
    st.integers(60, 300),
    st.integers(60, 300),
    sizes,
    st.integers(0, 2**32 - 1),
)
def test_a_layer_is_near_float_math(
    fmt: PackedFormat, tokens: int, experts: int, dim: int, inter: int, size: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    layer = Moe(fmt, experts, dim, inter, rng, even_packed)
    x, ids, weights = routed(tokens, experts, 4, dim, rng)
    x *= size
    assert nmse(layer.run(x, ids, weights), layer.float_math(x, ids, weights)) <= LAYER_NMSE


@by_way
def test_moe_experts_that_nobody_or_everybody_chose(with_tiles: bool) -> None:
    rng = np.random.default_rng(3)
    layer = Moe(FAST, 7, 64, 32, rng)
    x, ids, weights = routed(30, 7, 2, 64, rng)
    ids[:, 0], ids[:, 1] = 6, 2
    with granted(with_tiles):
        in_order = layer.run(x, ids.flip(1), weights.flip(1))
        out = layer.run(x, ids, weights)
        assert torch.equal(out, in_order) and torch.equal(in_order, layer.expected(x, ids, weights))
        assert layer.run(x[:0], ids[:0], weights[:0]).shape == (0, 64)


@by_name
@by_way
@pytest.mark.usefixtures("three_threads")
def test_a_token_may_name_an_expert_several_times(fmt: PackedFormat, with_tiles: bool) -> None:
    """Then an expert has more pairs than there are tokens."""
    rng = np.random.default_rng(4)
    layer = Moe(fmt, 3, 140, 300, rng)
    for tokens, threads in ((2, 3), (3, 1), (33, 3), (100, 1)):
        x, ids, weights = routed(tokens, 3, 3, 140, rng)
        ids[:] = ids[:, :1]
        set_threads(threads)
        with granted(with_tiles):
            assert torch.equal(layer.run(x, ids, weights), layer.expected(x, ids, weights))


@by_name
@by_way
@pytest.mark.usefixtures("three_threads")
def test_results_do_not_depend_on_threads_nodes_or_the_run(fmt: PackedFormat, with_tiles: bool) -> None:
    rng = np.random.default_rng(5)
    weight, layer = make_weight(fmt, 270, 520, rng), Moe(fmt, 5, 520, 300, rng, down=Q8)
    x, ids, weights = routed(130, 5, 2, 520, rng)
    parts = [slice(0, count) for count in (1, 30, 130)]  # hidden values are kept otherwise for few pairs
    expected = [layer.expected(x[part], ids[part], weights[part]) for part in parts]
    expected_wide = expected_linear(x, weight)
    for threads in (1, 2, 3, 2):
        set_threads(threads)
        assert parts_for(1) == thread_count() == threads
        with granted(with_tiles):
            assert torch.equal(torch.cat([ops.linear(x[:30], weight), ops.linear(x[30:], weight)]), expected_wide)
            for nodes in (1, 2, 3):
                layer.split(nodes)
                for part, result in zip(parts, expected, strict=True):
                    assert torch.equal(layer.run(x[part], ids[part], weights[part]), result), (threads, nodes, part)


@pytest.mark.usefixtures("three_threads")
def test_there_are_no_more_threads_than_scratch_serves() -> None:
    rng = np.random.default_rng(7)
    layer = Moe(FAST, 4, 64, 300, rng)
    x, ids, weights = routed(20, 4, 2, 64, rng)
    args = layer.arguments(x, ids, weights)  # with the scratch of one thread
    set_threads(3)
    torch.ops.dsr1.packed_moe_experts(*args)
    assert torch.equal(args[-1], layer.expected(x, ids, weights))


@by_name
@by_way
def test_a_token_alone_gets_the_same_bits_as_among_others(fmt: PackedFormat, with_tiles: bool) -> None:
    rng = np.random.default_rng(6)
    weight, layer = make_weight(fmt, 70, 130, rng), Moe(fmt, 6, 130, 150, rng)
    x, ids, weights = routed(300, 6, 3, 130, rng)
    with granted(with_tiles):
        linear_out, moe_out = ops.linear(x, weight), layer.run(x, ids, weights)
        for size in (1, 2, 3, 7, 40):
            part = slice(111, 111 + size)
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


FAST_BYTES = FAST.block_bytes


@pytest.mark.parametrize(
    ("x", "data", "name", "shape", "message"),
    [
        (torch.ones(1, 20), torch.zeros(FAST_BYTES, dtype=torch.uint8), "q5", (3, 20), "no kernel reads"),
        (torch.ones(1, 20), torch.zeros(FAST_BYTES, dtype=torch.int8), "fast", (3, 20), "contiguous uint8"),
        (torch.ones(1, 20), torch.zeros(2 * FAST_BYTES, dtype=torch.uint8)[::2], "fast", (3, 20), "contiguous uint8"),
        (torch.ones(1, 20), torch.zeros(1087, dtype=torch.uint8), "fast", (3, 20), "takes 1088 bytes"),
        (torch.ones(1, 20), torch.zeros(1088, dtype=torch.uint8), "fast", (17, 20), "takes 2176 bytes"),
        (torch.ones(1, 0), torch.zeros(0, dtype=torch.uint8), "fast", (3, 0), "takes 0 bytes"),
        (torch.ones(1, 21), torch.zeros(FAST_BYTES, dtype=torch.uint8), "fast", (3, 20), "cannot be multiplied"),
        (torch.ones(20), torch.zeros(FAST_BYTES, dtype=torch.uint8), "fast", (3, 20), "cannot be multiplied"),
        (torch.ones(1, 20).int(), torch.zeros(FAST_BYTES, dtype=torch.uint8), "fast", (3, 20), "cannot be multiplied"),
    ],
)
def test_linear_refuses_what_it_cannot_read(
    x: torch.Tensor, data: torch.Tensor, name: str, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.dsr1.packed_linear(x, data, name, *shape)


@pytest.mark.parametrize("bad", [-2, 4, 2**62])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("three_threads")
def test_moe_refuses_ids_out_of_range(bad: int, threads: int) -> None:
    set_threads(threads)
    rng = np.random.default_rng(0)
    layer = Moe(FAST, 4, 16, 8, rng)
    x, ids, weights = routed(3, 4, 2, 16, rng)
    before = layer.run(x, ids, weights)
    wrong = ids.clone()
    wrong[2, 1] = bad
    with pytest.raises(IndexError, match=r"outside -1 \.\. 3"):
        layer.run(x, wrong, weights)
    assert torch.equal(layer.run(x, ids, weights), before)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_moe_leaves_out_pairs_without_an_expert(tokens: int) -> None:
    """Of id -1: as with a weight of 0."""
    rng = np.random.default_rng(0)
    layer = Moe(FAST, 4, 16, 8, rng)
    x, ids, weights = routed(tokens, 4, 2, 16, rng)
    left_out = ids == ids[0, 0]
    expected = layer.run(x, ids, weights.masked_fill(left_out, 0))
    assert torch.allclose(layer.run(x, ids.masked_fill(left_out, -1), weights), expected, rtol=1e-5, atol=1e-6)
    assert not layer.run(x, torch.full_like(ids, -1), weights).any()


def test_moe_refuses_what_it_cannot_read() -> None:
    rng = np.random.default_rng(0)
    layer = Moe(FAST, 4, 16, 8, rng)
    good = layer.arguments(*routed(3, 4, 2, 16, rng))
    bad = {
        0: [good[0].double()],
        1: [good[1].int()],
        3: [good[3][:, :2].contiguous()],
        4: [0],
        5: ["q5"],
        6: [0, 3, 32],  # 4 rows are no table of 3 nodes
        7: [good[7][:5]],
        8: [good[8][: good[8].numel() - 1]],  # nothing left for a thread
    }
    for position, values in bad.items():
        for value in values:
            with pytest.raises(ValueError):
                torch.ops.dsr1.packed_moe_experts(*good[:position], value, *good[position + 1 :])
    many = good[3].repeat(17, 1)
    with pytest.raises(ValueError, match="68 rows is not one of 17 nodes"):
        torch.ops.dsr1.packed_moe_experts(*good[:3], many, *good[4:6], 17, *good[7:])


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
ON_ANOTHER_PROCESSOR = """
import numba, numpy as np
from quant.kernels import reference
from quant.kernels.activations import input_bytes, inputs_at, quantise_row, record_of, scale_of
from quant.kernels.decode import PACKED_CODES
from quant.kernels.packed_dot import ROW_BYTES, dot_tiles
from quant.kernels.packed_rows import TABLE_BYTES, set_tiles
from tests.test_packed_kernels import FORMATS, random_packed

@numba.njit
def run(code, data, size, x, k, memory, table, tokens, out):
    inputs = inputs_at(memory, 4, k, code)
    for t in range(4):
        quantise_row(inputs, t, x + t * k * 4)
    set_tiles(table, 0, data, 0, 2, data, size)
    set_tiles(table, 4, data, 2, 3, data, size)
    records = (record_of(inputs, 0), record_of(inputs, 1), record_of(inputs, 2), record_of(inputs, 3))
    scales = (scale_of(inputs, 0), scale_of(inputs, 1), scale_of(inputs, 2), scale_of(inputs, 3))
    dot_tiles(code, table, tokens, records, scales, 16, 3, out)

rng = np.random.default_rng(0)
x = rng.standard_normal((4, 300), dtype=np.float32)
for fmt in FORMATS:
    data = random_packed(fmt, (48, 300), rng)
    expected = reference.packed_linear(x, data, fmt, (48, 300), FUSED)
    memory, table = np.empty(input_bytes(4, 300), np.uint8), np.empty(TABLE_BYTES, np.uint8)
    for tokens in (1, 4):
        out, addresses = np.empty((4, ROW_BYTES // 4), np.float32), [a.ctypes.data for a in (data, x, memory, table)]
        run(PACKED_CODES[fmt.name], addresses[0], 3 * fmt.block_bytes, addresses[1], 300, *addresses[2:], tokens,
            out.ctypes.data)
        found = np.concatenate([out[:tokens, :32], out[:tokens, 64:80]], axis=1)
        np.testing.assert_array_equal(found, expected[:tokens], fmt.name)
"""


@pytest.mark.parametrize("name", OTHER_PROCESSORS)
def test_other_processors_get_the_bits_of_the_reference(name: str) -> None:
    if "x86" not in platform.machine().lower():
        pytest.skip("these are processors of x86")
    features = OTHER_PROCESSORS[name]
    script = ON_ANOTHER_PROCESSOR.replace("FUSED", str("fma" in features))
    run_python(script, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)

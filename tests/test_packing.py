"""The bytes of packed formats, checked against docs/formats.md rather than against the code that writes them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats import QuantTensor
from quant.packed import ACCURATE, FAST, PACKED_FORMATS, Q8, ExpertRecord, PackedFormat
from quant.packing import Codes, bf16_of_float, decode, float_of_bf16, group_scales, pack, padded_shape, unpack

FORMATS = st.sampled_from(sorted(PACKED_FORMATS.values(), key=lambda fmt: fmt.name))
SHAPES = st.tuples(st.integers(1, 40), st.sampled_from((1, 96, 128, 160, 320, 416)))
ONE = 0x3F80  # 1.0 as bfloat16


def random_codes(fmt: PackedFormat, shape: tuple[int, int], seed: int) -> Codes:
    rng = np.random.default_rng(seed)
    rows, columns = padded_shape(shape)
    codes = rng.integers(0, 2**fmt.bits, (rows, columns), np.uint8)
    bits = bf16_of_float(rng.standard_normal((rows, columns // fmt.group), dtype=np.float32))
    if fmt.scale == "bf16":
        return Codes(codes, bits)
    integers = rng.integers(-32, 32, (rows, columns // fmt.group), np.int8)
    return Codes(codes, integers, np.ascontiguousarray(bits[:, : columns // 128]))


def flat_codes(fmt: PackedFormat, shape: tuple[int, int]) -> Codes:
    """All codes 0, all bfloat16 scales 1, all 6-bit integers -32: every bit of an `accurate` header but d's is 0."""
    rows, columns = padded_shape(shape)
    codes = np.zeros((rows, columns), np.uint8)
    ones = np.full((rows, columns // fmt.group), ONE, np.uint16)
    if fmt.scale == "bf16":
        return Codes(codes, ones)
    return Codes(codes, np.full(ones.shape, -32, np.int8), np.full((rows, columns // 128), ONE, np.uint16))


def changed_bytes(fmt: PackedFormat, flat: Codes, changed: Codes) -> dict[int, int]:
    before, after = pack(flat, fmt), pack(changed, fmt)
    return {int(at): int(after[at]) for at in np.flatnonzero(before != after)}


def block_start(fmt: PackedFormat, columns: int, row: int, column: int) -> int:
    size = {"fast": 1152, "accurate": 1152, "q8": 2176}[fmt.name]
    return (row // 16 * (columns // 128) + column // 128) * size


@given(FORMATS, SHAPES, st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_unpack_is_the_reverse_of_pack(fmt: PackedFormat, shape: tuple[int, int], seed: int) -> None:
    quantised = random_codes(fmt, shape, seed)
    data = pack(quantised, fmt)
    assert data.dtype == np.uint8 and data.shape == (fmt.nbytes(shape),)
    for ours, original in zip(unpack(data, fmt, shape), quantised, strict=True):
        np.testing.assert_array_equal(ours, original)
        assert original is None or (ours is not None and ours.dtype == original.dtype)


@given(FORMATS, st.integers(0, 47), st.integers(0, 383), st.integers(1, 15))
@settings(max_examples=25, deadline=None)
def test_a_code_lies_where_the_documentation_says(fmt: PackedFormat, row: int, column: int, code: int) -> None:
    flat = flat_codes(fmt, (48, 384))
    codes = flat.codes.copy()
    codes[row, column] = code
    r, k, start = row % 16, column % 128, block_start(fmt, 384, row, column)
    if fmt.bits == 8:
        at, value = 128 + 64 * (k // 4) + 4 * r + k % 4, code
    else:
        at, value = 128 + 64 * (k // 8) + 4 * r + k % 4, code << (4 if k % 8 >= 4 else 0)
    assert changed_bytes(fmt, flat, flat._replace(codes=codes)) == {start + at: value}


@given(st.sampled_from((FAST, Q8)), st.integers(0, 47), st.integers(0, 11))
@settings(max_examples=25, deadline=None)
def test_a_scale_lies_where_the_documentation_says(fmt: PackedFormat, row: int, group: int) -> None:
    flat = flat_codes(fmt, (48, 384))
    scales = flat.scales.copy()
    scales[row, group] = 0x1234
    start = block_start(fmt, 384, row, 32 * group) + 32 * (group % 4) + 2 * (row % 16)
    assert changed_bytes(fmt, flat, flat._replace(scales=scales)) == {start: 0x34, start + 1: 0x12}


@given(st.integers(0, 47), st.integers(0, 23), st.integers(-31, 31))
@settings(max_examples=25, deadline=None)
def test_a_6_bit_scale_lies_where_the_documentation_says(row: int, group: int, integer: int) -> None:
    flat = flat_codes(ACCURATE, (48, 384))
    scales = flat.scales.copy()
    scales[row, group] = integer
    start, r, g = block_start(ACCURATE, 384, row, 16 * group), row % 16, group % 8
    upper, lower = divmod(integer + 32, 16)
    expected = {
        start + 32 + 16 * (g // 4) + r: upper << 2 * (g % 4),
        start + 64 + 16 * (g // 2) + r: lower << 4 * (g % 2),
    }
    assert changed_bytes(ACCURATE, flat, flat._replace(scales=scales)) == {at: v for at, v in expected.items() if v}


def test_the_scale_of_a_row_comes_first() -> None:
    flat = flat_codes(ACCURATE, (48, 384))
    assert flat.block_scales is not None
    scales = flat.block_scales.copy()
    scales[37, 2] = 0x1234
    start = (2 * 3 + 2) * 1152 + 2 * 5
    changed = changed_bytes(ACCURATE, flat, flat._replace(block_scales=scales))
    assert changed == {start: 0x34, start + 1: 0x12}


def test_values_are_levels_times_scales() -> None:
    fast = np.zeros(1152, np.uint8)
    fast[128:] = 0x88
    fast[0:2], fast[66:68] = (0x80, 0x3F), (0x40, 0xC0)  # row 0, columns 0..31: 1; row 1, columns 64..95: -3
    fast[128], fast[128 + 64 * 9 + 4 + 2] = 0x0F, 0x78  # row 0, columns 0 and 4; row 1, columns 74 and 78
    expected = np.zeros((16, 128), np.float32)
    expected[0, 0], expected[0, 4], expected[1, 78] = 7, -8, 3
    np.testing.assert_array_equal(decode(fast, FAST, (16, 128)), expected)
    accurate = np.zeros(1152, np.uint8)
    accurate[0:2], accurate[2:4] = (0x00, 0x40), (0x80, 0x3F)  # d: row 0 has 2, row 1 has 1, others 0
    accurate[32:64] = 0xAA  # all integers 0 ...
    accurate[48], accurate[96] = 0xA6, 0xF0  # but that of row 0's group 5: 0b01_1111 - 32 = -1
    accurate[128 + 64 * 10] = 0xF8  # row 0, columns 80 and 84: codes 8 and 15
    values = decode(accurate, ACCURATE, (16, 128))
    assert values[0, 80] == 3 * -2 and values[0, 84] == 113 * -2 and (values[0, 81:84] == -127 * -2).all()
    assert not values[0, :80].any() and not values[0, 96:].any() and not values[1:].any()


def test_decoding_is_exact() -> None:
    """As float64 computes it, in the formats whose products need the most bits."""
    quantised = random_codes(ACCURATE, (32, 256), 0)
    assert quantised.block_scales is not None
    levels = np.array(ACCURATE.levels, np.float64)[quantised.codes]
    scales = quantised.scales.astype(np.float64) * float_of_bf16(quantised.block_scales).repeat(8, axis=1)
    np.testing.assert_array_equal(group_scales(quantised, ACCURATE), scales)
    np.testing.assert_array_equal(
        decode(pack(quantised, ACCURATE), ACCURATE, (32, 256)), levels * scales.repeat(16, axis=1)
    )


@given(st.floats(-(2.0**127), 2.0**127, width=32))
@settings(max_examples=25, deadline=None)
def test_bfloat16_is_rounded_as_torch_rounds_it(value: float) -> None:
    ours = bf16_of_float(np.array([value], np.float32))
    theirs = torch.tensor([value]).to(torch.bfloat16)
    assert ours[0] == theirs.view(torch.uint16).item() and float_of_bf16(ours)[0] == theirs.item()


def test_a_packed_tensor_gives_its_plain_values() -> None:
    data = pack(random_codes(Q8, (17, 130), 3), Q8)
    tensor = QuantTensor(Q8, (17, 130), torch.from_numpy(data))
    assert tensor.nbytes == 2 * 2 * 2176
    assert torch.equal(tensor.dequantize(torch.float32), torch.from_numpy(decode(data, Q8, (17, 130))))


@pytest.mark.parametrize(("fmt", "bits", "nbytes"), [(FAST, 4.5, 1152), (ACCURATE, 4.5, 1152), (Q8, 8.5, 2176)])
def test_sizes(fmt: PackedFormat, bits: float, nbytes: int) -> None:
    assert fmt.bits_per_weight == bits and fmt.block_bytes == nbytes
    assert fmt.nbytes((1, 1)) == fmt.nbytes((16, 128)) == nbytes and fmt.nbytes((17, 129)) == 4 * nbytes
    assert fmt.nbytes((2048, 7168)) == 2048 * 7168 * bits / 8


def test_an_expert_record_holds_whole_pages() -> None:
    record = ExpertRecord(ACCURATE, dim=7168, inter_dim=2048)
    matrix = 2048 * 7168 * 9 // 16
    assert (record.w1, record.w3, record.w2) == (0, matrix, 2 * matrix)
    assert record.nbytes == 3 * matrix and record.nbytes % 4096 == 0
    assert ExpertRecord(FAST, dim=128, inter_dim=16).nbytes == 4096 * 3  # 1152 + 1152 + 9216 bytes

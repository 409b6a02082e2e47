"""The bytes of packed formats, checked against docs/formats.md rather than against the code that writes them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats import QuantTensor
from quant.packed import ACCURATE, FAST, PACKED_FORMATS, Q8, ExpertRecord, PackedFormat
from quant.packing import Codes, bf16_of_float, decode, float_of_bf16, pack, padded_shape, unpack, whole_weights

FORMATS = st.sampled_from(sorted(PACKED_FORMATS.values(), key=lambda fmt: fmt.name))
SHAPES = st.tuples(st.integers(1, 40), st.sampled_from((1, 96, 128, 160, 320, 416)))
ONE = 0x3F80  # 1.0 as bfloat16
HEADER, BLOCK = {"fast": 64, "accurate": 128, "q8": 64}, {"fast": 1088, "accurate": 1152, "q8": 2112}


def random_codes(fmt: PackedFormat, shape: tuple[int, int], seed: int) -> Codes:
    rng = np.random.default_rng(seed)
    rows, columns = padded_shape(shape)
    codes = rng.integers(0, 2**fmt.bits, (rows, columns), np.uint8)
    groups = (rows, columns // fmt.group)
    integers = {
        "fast": 2 * rng.integers(-8, 8, groups, np.int8) + np.int8(1),
        "accurate": rng.integers(-32, 32, groups, np.int8),
        "q8": np.ones(groups, np.int8),
    }
    d = rng.standard_normal((rows, columns // 128), dtype=np.float32)
    return Codes(codes, integers[fmt.name], bf16_of_float(np.abs(d)))


def flat_codes(fmt: PackedFormat, shape: tuple[int, int]) -> Codes:
    """All codes 0, all d 1, all integers the lowest: every bit of a header but d's is 0."""
    rows, columns = padded_shape(shape)
    integers = np.full((rows, columns // fmt.group), {"fast": -15, "accurate": -32, "q8": 1}[fmt.name], np.int8)
    return Codes(np.zeros((rows, columns), np.uint8), integers, np.full((rows, columns // 128), ONE, np.uint16))


def changed_bytes(fmt: PackedFormat, flat: Codes, changed: Codes) -> dict[int, int]:
    before, after = pack(flat, fmt), pack(changed, fmt)
    return {int(at): int(after[at]) for at in np.flatnonzero(before != after)}


def block_start(fmt: PackedFormat, columns: int, row: int, column: int) -> int:
    return (row // 16 * (columns // 128) + column // 128) * BLOCK[fmt.name]


@given(FORMATS, SHAPES, st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_unpack_is_the_reverse_of_pack(fmt: PackedFormat, shape: tuple[int, int], seed: int) -> None:
    quantised = random_codes(fmt, shape, seed)
    data = pack(quantised, fmt)
    assert data.dtype == np.uint8 and data.shape == (fmt.nbytes(shape),)
    for ours, original in zip(unpack(data, fmt, shape), quantised, strict=True):
        np.testing.assert_array_equal(ours, original)
        assert ours.dtype == original.dtype and ours.flags.c_contiguous


@given(FORMATS, st.integers(0, 47), st.integers(0, 383), st.integers(1, 15))
@settings(max_examples=25, deadline=None)
def test_a_code_lies_where_the_documentation_says(fmt: PackedFormat, row: int, column: int, code: int) -> None:
    flat = flat_codes(fmt, (48, 384))
    codes = flat.codes.copy()
    codes[row, column] = code
    r, k, start = row % 16, column % 128, block_start(fmt, 384, row, column) + HEADER[fmt.name]
    if fmt.bits == 8:
        at, value = 64 * (k // 4) + 4 * r + k % 4, code
    else:
        at, value = 64 * (k // 8) + 4 * r + k % 4, code << (4 if k % 8 >= 4 else 0)
    assert changed_bytes(fmt, flat, flat._replace(codes=codes)) == {start + at: value}


@given(FORMATS, st.integers(0, 47), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_a_rows_d_lies_where_the_documentation_says(fmt: PackedFormat, row: int, block: int) -> None:
    flat = flat_codes(fmt, (48, 384))
    scales = flat.block_scales.copy()
    scales[row, block] = 0x1234
    start = block_start(fmt, 384, row, 128 * block) + 4 * (row % 16)
    assert changed_bytes(fmt, flat, flat._replace(block_scales=scales)) == {start + 2: 0x34, start + 3: 0x12}


@given(st.integers(0, 47), st.integers(0, 11), st.integers(1, 15))
@settings(max_examples=25, deadline=None)
def test_an_odd_integer_lies_where_the_documentation_says(row: int, group: int, stored: int) -> None:
    flat = flat_codes(FAST, (48, 384))
    integers = flat.integers.copy()
    integers[row, group] = 2 * stored - 15
    word, bit = block_start(FAST, 384, row, 32 * group) + 4 * (row % 16), 4 * (group % 4)
    changed = changed_bytes(FAST, flat, flat._replace(integers=integers))
    assert changed == {word + bit // 8: stored << bit % 8}


@given(st.integers(0, 47), st.integers(0, 23), st.integers(-31, 31))
@settings(max_examples=25, deadline=None)
def test_a_6_bit_integer_lies_where_the_documentation_says(row: int, group: int, integer: int) -> None:
    flat = flat_codes(ACCURATE, (48, 384))
    integers = flat.integers.copy()
    integers[row, group] = integer
    word, g = block_start(ACCURATE, 384, row, 16 * group) + 4 * (row % 16), group % 8
    upper, lower = divmod(integer + 32, 16)
    expected = {word + g // 4: upper << 2 * (g % 4), word + 64 + g // 2: lower << 4 * (g % 2)}
    changed = changed_bytes(ACCURATE, flat, flat._replace(integers=integers))
    assert changed == {at: value for at, value in expected.items() if value}


def test_values_are_levels_times_integers_times_d() -> None:
    fast = np.zeros(1088, np.uint8)
    fast[64:] = 0x88
    fast[0:4], fast[4:8] = (0x08, 0x00, 0x80, 0x3F), (0x00, 0x06, 0x40, 0x40)  # row 0: 1, s 1; row 1: 3, s[2] -3
    fast[64], fast[64 + 64 * 9 + 4 + 2] = 0x0F, 0x78  # row 0, columns 0 and 4; row 1, columns 74 and 78
    expected = np.zeros((16, 128), np.float32)
    expected[0, 0], expected[0, 4], expected[1, 78] = 7, -8, 9
    np.testing.assert_array_equal(decode(fast, FAST, (16, 128)), expected)
    accurate = np.zeros(1152, np.uint8)
    accurate[2:4], accurate[6:8] = (0x00, 0x40), (0x80, 0x3F)  # d: row 0 has 2, row 1 has 1, others 0
    for row in range(16):
        accurate[4 * row : 4 * row + 2] = 0xAA  # all integers 0 ...
    accurate[1], accurate[64 + 2] = 0xA6, 0xF0  # but that of row 0's group 5: 0b01_1111 - 32 = -1
    accurate[128 + 64 * 10] = 0xF8  # row 0, columns 80 and 84: codes 8 and 15
    values = decode(accurate, ACCURATE, (16, 128))
    assert values[0, 80] == 3 * -2 and values[0, 84] == 113 * -2 and (values[0, 81:84] == -127 * -2).all()
    assert not values[0, :80].any() and not values[0, 96:].any() and not values[1:].any()
    q8 = np.full(2112, 128, np.uint8)
    q8[:64] = 0
    q8[62:64], q8[64 + 64 * 31 + 4 * 15 + 3] = (0x00, 0x3F), 1  # row 15: 0.5; its column 127
    assert decode(q8, Q8, (16, 128))[15, 127] == -127 / 2 and np.count_nonzero(decode(q8, Q8, (16, 128))) == 1


@given(FORMATS, st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_decoding_is_exact(fmt: PackedFormat, seed: int) -> None:
    """As float64 computes it, from integers that 8-bit kernels can multiply."""
    quantised = random_codes(fmt, (32, 256), seed)
    levels = np.arange(256.0) - fmt.zero if fmt.levels is None else np.array(fmt.levels, np.float64)
    whole = levels[quantised.codes] * quantised.integers.repeat(fmt.group, axis=1)
    np.testing.assert_array_equal(whole_weights(quantised, fmt), whole)
    assert np.abs(whole).max() <= {"fast": 120, "accurate": 127 * 32, "q8": 128}[fmt.name]
    d = float_of_bf16(quantised.block_scales).astype(np.float64).repeat(128, axis=1)
    np.testing.assert_array_equal(decode(pack(quantised, fmt), fmt, (32, 256)), whole * d)


@given(st.floats(-(2.0**127), 2.0**127, width=32))
@settings(max_examples=25, deadline=None)
def test_bfloat16_is_rounded_as_torch_rounds_it(value: float) -> None:
    ours = bf16_of_float(np.array([value], np.float32))
    theirs = torch.tensor([value]).to(torch.bfloat16)
    assert ours[0] == theirs.view(torch.uint16).item() and float_of_bf16(ours)[0] == theirs.item()


def test_a_packed_tensor_gives_its_plain_values() -> None:
    data = pack(random_codes(Q8, (17, 130), 3), Q8)
    tensor = QuantTensor(Q8, (17, 130), torch.from_numpy(data))
    assert tensor.nbytes == 2 * 2 * 2112
    assert torch.equal(tensor.dequantize(torch.float32), torch.from_numpy(decode(data, Q8, (17, 130))))


@pytest.mark.parametrize(("fmt", "bits", "nbytes"), [(FAST, 4.25, 1088), (ACCURATE, 4.5, 1152), (Q8, 8.25, 2112)])
def test_sizes(fmt: PackedFormat, bits: float, nbytes: int) -> None:
    assert fmt.bits_per_weight == bits and fmt.block_bytes == nbytes == fmt.header_bytes + 16 * 128 * fmt.bits // 8
    assert fmt.nbytes((1, 1)) == fmt.nbytes((16, 128)) == nbytes and fmt.nbytes((17, 129)) == 4 * nbytes
    assert fmt.nbytes((2048, 7168)) == 2048 * 7168 * bits / 8


def test_an_expert_record_holds_whole_pages() -> None:
    record = ExpertRecord(ACCURATE, dim=7168, inter_dim=2048)
    matrix = 2048 * 7168 * 9 // 16
    assert (record.w1, record.w3, record.w2) == (0, matrix, 2 * matrix)
    assert record.nbytes == 3 * matrix and record.nbytes % 4096 == 0
    assert ExpertRecord(FAST, dim=128, inter_dim=16).nbytes == 4096 * 3  # 1088 + 1088 + 8704 bytes

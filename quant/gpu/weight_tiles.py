"""A tile of a weight matrix as bfloat16, from the bytes that stand in a store or checkpoint: [ROWS, 128] values.

Nothing is permuted at upload. A packed block (docs/formats.md) is 16 rows side by side in lines of 64 bytes, so the
words of a tile are contiguous: a thread loads 16 bytes, four rows of one line, and a warp 512 bytes in a row. Unpacked,
the thread holds 8 neighbouring columns of each of its rows, which shared memory takes as they are. (In q8 these are of
two lines, so a thread loads twice, and a warp of each second line.)

A value is integer × multiplier: the integers s × level fit bfloat16 exactly in `fast` and `q8`, FP8 codes and bf16
weights do too; those of `accurate` have up to 13 bits and are rounded to 8, an error of at most 2^-9.
"""

import triton
import triton.language as tl

from quant.packed import ACCURATE, FAST, GAUSS_16, Q8

# Numbers of the formats, for kernels.
FAST_CODE = tl.constexpr(0)
ACCURATE_CODE = tl.constexpr(1)
Q8_CODE = tl.constexpr(2)
FP8_CODE = tl.constexpr(3)  # decoded by bit operations
FP8_NATIVE_CODE = tl.constexpr(4)  # decoded by the chip, from sm_89 on
BF16_CODE = tl.constexpr(5)

TILE = tl.constexpr(16)  # rows of a packed tile
COLUMNS = tl.constexpr(128)  # of a packed block, and of a block of FP8 weights
FAST_WORDS = tl.constexpr(FAST.block_bytes // 4)
ACCURATE_WORDS = tl.constexpr(ACCURATE.block_bytes // 4)
Q8_WORDS = tl.constexpr(Q8.block_bytes // 4)


def _four_bytes(values: tuple[int, ...]) -> int:
    """Four signed bytes as one signed 32-bit integer."""
    return int.from_bytes(bytes(value & 255 for value in values), "little", signed=True)


LEVELS_0 = tl.constexpr(_four_bytes(GAUSS_16[:4]))
LEVELS_1 = tl.constexpr(_four_bytes(GAUSS_16[4:8]))
LEVELS_2 = tl.constexpr(_four_bytes(GAUSS_16[8:12]))
LEVELS_3 = tl.constexpr(_four_bytes(GAUSS_16[12:]))


@triton.jit
def weight_tile(data, scale, first_row, rows, columns, block, FORMAT: tl.constexpr, ROWS: tl.constexpr):
    """bf16 [ROWS, 128] and float32 multipliers [ROWS]: rows from `first_row` on, columns from 128 * block on.

    data: int32 words of a packed matrix [rows, columns], in which `first_row` is a multiple of 16; uint8 of FP8, bf16.
    scale: float32 [rows / 128, columns / 128] of FP8. Beyond the matrix there are zeros.
    """
    if FORMAT == FAST_CODE:
        return _fast_tile(data, first_row, rows, columns, block, ROWS)
    elif FORMAT == ACCURATE_CODE:
        return _accurate_tile(data, first_row, rows, columns, block, ROWS)
    elif FORMAT == Q8_CODE:
        return _q8_tile(data, first_row, rows, columns, block, ROWS)
    else:
        return _plain_tile(data, scale, first_row, rows, columns, block, FORMAT, ROWS)


@triton.jit
def _block_words(data, first_row, rows, columns, block, WORDS: tl.constexpr, ROWS: tl.constexpr):
    """Where each row's first word of the block is, [ROWS], and which rows there are."""
    row = first_row + tl.arange(0, ROWS)
    tile = (row // TILE).to(tl.int64)
    at = (tile * tl.cdiv(columns, COLUMNS) + block) * WORDS + row % TILE
    return data + at, tile < tl.cdiv(rows, TILE)


@triton.jit
def _lines(words, there, FIRST: tl.constexpr, STEP: tl.constexpr, LINES: tl.constexpr):
    """int32 [ROWS, LINES]: the words of the rows in the lines FIRST, FIRST + STEP and so on."""
    lines = FIRST + STEP * tl.arange(0, LINES)
    return tl.load(words[:, None] + lines[None, :] * TILE, mask=there[:, None], other=0)


@triton.jit
def _multipliers(header):
    """The bfloat16 d in the upper half of each header word, as float32."""
    return (header & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _eight_columns(c0, c1, c2, c3, c4, c5, c6, c7, ROWS: tl.constexpr):
    """bf16 [ROWS, 128] of eight [ROWS, 16], the values of each line's columns 0 .. 7: they stay in their thread."""
    evens = tl.join(tl.join(c0, c4), tl.join(c2, c6))  # each join adds the last dimension
    odds = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    return tl.reshape(tl.join(evens, odds), ROWS, COLUMNS)


@triton.jit
def _fast_tile(data, first_row, rows, columns, block, ROWS: tl.constexpr):
    words, there = _block_words(data, first_row, rows, columns, block, FAST_WORDS, ROWS)
    header = tl.load(words, mask=there, other=0)
    codes = _lines(words, there, 1, 1, 16)
    group = tl.arange(0, 16) // 4  # of each line of 8 columns
    integers = ((header[:, None] >> 4 * group[None, :]) & 15) * 2 - 15
    values = _eight_columns(
        _fast(codes, 0, integers),
        _fast(codes, 8, integers),
        _fast(codes, 16, integers),
        _fast(codes, 24, integers),
        _fast(codes, 4, integers),
        _fast(codes, 12, integers),
        _fast(codes, 20, integers),
        _fast(codes, 28, integers),
        ROWS,
    )
    return values, _multipliers(header)


@triton.jit
def _fast(words, SHIFT: tl.constexpr, integers):
    return ((((words >> SHIFT) & 15) - 8) * integers).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _accurate_tile(data, first_row, rows, columns, block, ROWS: tl.constexpr):
    words, there = _block_words(data, first_row, rows, columns, block, ACCURATE_WORDS, ROWS)
    header = tl.load(words, mask=there, other=0)
    lower = tl.load(words + TILE, mask=there, other=0)
    codes = _lines(words, there, 2, 1, 16)
    group = tl.arange(0, 16) // 2
    upper_bits = (header[:, None] >> 2 * group[None, :]) & 3
    integers = (upper_bits * 16 + ((lower[:, None] >> 4 * group[None, :]) & 15)) - 32
    values = _eight_columns(
        _accurate(codes, 0, integers),
        _accurate(codes, 8, integers),
        _accurate(codes, 16, integers),
        _accurate(codes, 24, integers),
        _accurate(codes, 4, integers),
        _accurate(codes, 12, integers),
        _accurate(codes, 20, integers),
        _accurate(codes, 28, integers),
        ROWS,
    )
    return values, _multipliers(header)


@triton.jit
def _accurate(words, SHIFT: tl.constexpr, integers):
    """The level, a byte of one of four words that is chosen without memory, times its group's integer."""
    codes = words >> SHIFT
    low = tl.where((codes & 4) != 0, LEVELS_1, LEVELS_0)
    high = tl.where((codes & 4) != 0, LEVELS_3, LEVELS_2)
    four = tl.where((codes & 8) != 0, high, low)
    level = (four << (24 - (codes & 3) * 8)) >> 24
    return (level * integers).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _q8_tile(data, first_row, rows, columns, block, ROWS: tl.constexpr):
    words, there = _block_words(data, first_row, rows, columns, block, Q8_WORDS, ROWS)
    header = tl.load(words, mask=there, other=0)
    first, second = _lines(words, there, 1, 2, 16), _lines(words, there, 2, 2, 16)
    values = _eight_columns(
        _q8(first, 0),
        _q8(first, 8),
        _q8(first, 16),
        _q8(first, 24),
        _q8(second, 0),
        _q8(second, 8),
        _q8(second, 16),
        _q8(second, 24),
        ROWS,
    )
    return values, _multipliers(header)


@triton.jit
def _q8(words, SHIFT: tl.constexpr):
    return (((words >> SHIFT) & 255) - 128).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _plain_tile(data, scale, first_row, rows, columns, block, FORMAT: tl.constexpr, ROWS: tl.constexpr):
    row = first_row + tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    values = tl.load(data + at, mask=there, other=0)
    if FORMAT == BF16_CODE:
        return values, tl.full([ROWS], 1.0, tl.float32)
    multipliers = tl.load(scale + row // COLUMNS * tl.cdiv(columns, COLUMNS) + block, mask=row < rows, other=0.0)
    if FORMAT == FP8_NATIVE_CODE:
        return values.to(tl.float8e4nv, bitcast=True).to(tl.bfloat16), multipliers
    return e4m3_values(values), multipliers


@triton.jit
def e4m3_values(codes):
    """uint8 codes of E4M3 as bfloat16, exactly: the same bits as a half are the value / 256, subnormals included."""
    bits = codes.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    values = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), values).to(tl.bfloat16)

"""Activations for packed weights: 8-bit integers with one scale for each 128 columns, as docs/formats.md says.

A matrix x [rows, K] of them is `Inputs`: a record a row, and the scales apart. With B = blocks of 128 columns:

    record      int8 [128 B]     q = x * (127 / max|x|), rounded to nearest, halves to even; filled up with zeros
                int32 [B, 8]     where the sums of a block start: below
                                 (filled up to an odd number of cache lines, so that rows do not compete for places)
    scales      float32 [B, rows]   max|x| / 127

Some processors multiply unsigned with signed bytes only. There weights are multiplied as level + offset, and what
that adds is taken off by starting each group's sum at -offset times the group's sum of q: starts[g], for the groups
of the weights' format. NaN makes its block's scale NaN; infinity makes it infinite, with all q 0: either way the
result is NaN.
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.decode import ACCURATE_CODE, FAST_CODE
from quant.kernels.jit import inner, shared
from quant.kernels.tiles import floats, words
from quant.kernels.vector import (
    F32,
    I8,
    I32,
    LANES,
    POINTER,
    VF,
    VI,
    i64,
    load_lanes,
    splat,
    splat_bits,
    splat_float,
    tail_mask,
)
from quant.packed import ACCURATE, BLOCK_K, FAST, Q8, PackedFormat

STARTS = 8  # int32 of a block
LINE = 64
LARGEST = 127.0
FLOAT_MAX = 3.4028234663852886e38
# Added to a float32 below 2**22, it leaves the nearest integer (halves to even) in the lowest bits.
ROUND, ROUND_BITS = 1.5 * 2.0**23, 0x4B400000


def offset_of(fmt: PackedFormat) -> int:
    """What makes the levels of a format unsigned."""
    return fmt.zero if fmt.levels is None else 128


FAST_OFFSET, ACCURATE_OFFSET, Q8_OFFSET = (offset_of(fmt) for fmt in (FAST, ACCURATE, Q8))


class Inputs(NamedTuple):
    """Quantised activations: addresses of the records and of the scales, and their sizes. code: the weights' format."""

    records: int
    scales: int
    rows: int
    k: int
    code: int


@shared
def k_blocks(k: int) -> int:
    """Blocks of 128 that hold `k` values."""
    return (k + BLOCK_K - 1) // BLOCK_K


@shared
def record_bytes(k: int) -> int:
    """Bytes of one row's record: an odd number of cache lines."""
    return ((k_blocks(k) * (BLOCK_K + 4 * STARTS) + LINE - 1) // LINE | 1) * LINE


@shared
def input_bytes(rows: int, k: int) -> int:
    """Bytes of the records and scales of `rows` rows: the scales come after the records."""
    return rows * record_bytes(k) + rows * k_blocks(k) * 4


@inner
def inputs_at(address, rows, k, code):  # type: ignore[no-untyped-def]
    """Inputs whose records and scales lie at `address`."""
    return Inputs(address, address + rows * record_bytes(k), rows, k, code)


@inner
def record_of(inputs, row):  # type: ignore[no-untyped-def]
    """Address of a row's record."""
    return inputs.records + row * record_bytes(inputs.k)


@inner
def scale_of(inputs, row):  # type: ignore[no-untyped-def]
    """Address of a row's first scale; the following ones are 4 * rows bytes apart."""
    return inputs.scales + row * 4


@intrinsic
def _quantise_block(typingctx, x, count, q, scale, sums):  # type: ignore[no-untyped-def]
    """128 bytes at `q`, one float32 at `scale` and the 8 sums of 16 q each at `sums`.

    From the float32 at `x`, of which all from `count` on count as 0.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_block(builder, *args)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5), codegen


# The Python signature of an intrinsic has one argument more than its callers give.
quantise_block: Any = _quantise_block


def _emit_block(builder: Any, x: Any, count: Any, q: Any, scale: Any, sums: Any) -> None:
    vectors = []
    for at in range(0, BLOCK_K, LANES):
        mask = tail_mask(builder, builder.sub(count, i64(at)))
        vectors.append(load_lanes(builder, builder.add(x, i64(4 * at)), F32, mask))
    largest = _largest(builder, vectors)
    _store(builder, builder.fdiv(largest, ir.Constant(F32, LARGEST)), scale, 0)
    inverse = splat(builder, _bounded(builder, builder.fdiv(ir.Constant(F32, LARGEST), largest)), VF)
    for number, values in enumerate(vectors):
        rounded = _round(builder, builder.fmul(values, inverse))
        _store(builder, builder.trunc(rounded, ir.VectorType(I8, LANES)), q, number * LANES)
        _store(builder, _reduce(builder, "add", rounded), sums, 4 * number)


def _largest(builder: Any, vectors: list[Any]) -> Any:
    """max|x|. Compared as integers, which order the bits of positive floats, and NaN above infinity."""
    sizes = [builder.and_(builder.bitcast(values, VI), splat_bits(0x7FFFFFFF)) for values in vectors]
    largest = sizes[0]
    for size in sizes[1:]:
        largest = builder.select(builder.icmp_signed(">", largest, size), largest, size)
    return builder.bitcast(_reduce(builder, "smax", largest), F32)


def _bounded(builder: Any, inverse: Any) -> Any:
    """127 / max|x|, finite: for blocks of zeros, and of values so small that the quotient overflows."""
    limit = ir.Constant(F32, FLOAT_MAX)
    return builder.select(builder.fcmp_ordered(">", inverse, limit), limit, inverse)


def _round(builder: Any, values: Any) -> Any:
    """Nearest integers, halves to even; 0 for NaN."""
    bits = builder.bitcast(builder.fadd(values, splat_float(ROUND)), VI)
    is_number = builder.fcmp_ordered("ord", values, values)
    return builder.select(is_number, builder.sub(bits, splat_bits(ROUND_BITS)), splat_bits(0))


def _reduce(builder: Any, how: str, lanes: Any) -> Any:
    kind = ir.FunctionType(I32, [VI])
    reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{how}.v{LANES}i32")
    return builder.call(reduce, [lanes])


def _store(builder: Any, value: Any, address: Any, offset: int) -> None:
    builder.store(value, builder.inttoptr(builder.add(address, i64(offset)), POINTER)).align = 1


@inner
def _set_starts(starts, code):  # type: ignore[no-untyped-def]
    """From the sums of 16 q each, int32 [8], where the sums of the format's groups start."""
    if code == FAST_CODE:
        for group in range(4):
            starts[group] = -FAST_OFFSET * (starts[2 * group] + starts[2 * group + 1])
    elif code == ACCURATE_CODE:
        for group in range(8):
            starts[group] *= -ACCURATE_OFFSET
    else:
        starts[0] = -Q8_OFFSET * starts.sum()


@inner
def quantise(inputs, row, block, x, count):  # type: ignore[no-untyped-def]
    """Block `block` of a row from `count` float32 at `x`; what is missing of 128 counts as 0."""
    record, blocks = record_of(inputs, row), k_blocks(inputs.k)
    starts = record + blocks * BLOCK_K + block * STARTS * 4
    scale = scale_of(inputs, row) + block * inputs.rows * 4
    quantise_block(x, count, record + block * BLOCK_K, scale, starts)
    _set_starts(words(starts, (STARTS,)), inputs.code)


@inner
def quantise_row(inputs, row, x):  # type: ignore[no-untyped-def]
    """All blocks of a row from float32 [k] at `x`."""
    for block in range(k_blocks(inputs.k)):
        quantise(inputs, row, block, x + block * BLOCK_K * 4, inputs.k - block * BLOCK_K)


@inner
def copy_row(source, row, target, to):  # type: ignore[no-untyped-def]
    """Row `to` of `target` = row `row` of `source`."""
    count = record_bytes(source.k) // 4
    words(record_of(target, to), (count,))[:] = words(record_of(source, row), (count,))
    scales, copies = scale_of(source, row), scale_of(target, to)
    for block in range(k_blocks(source.k)):
        floats(copies + block * target.rows * 4, (1,))[0] = floats(scales + block * source.rows * 4, (1,))[0]

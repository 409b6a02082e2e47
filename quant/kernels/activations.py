"""Activations for packed weights: 8-bit integers in groups of 32, as docs/formats.md says.

A token's K values lie in blocks of 128, filled up with zeros; a block has the same number as the weights' blocks:

    bytes     0 .. 127   int8 [128]   q = x * (127 / max|x|), rounded to nearest, halves to even
    bytes   128 .. 143   float32 [4]  scale = max|x| / 127 of each group of 32
    bytes   144 .. 175   int32 [8]    -offset times the sum of q, for each 16
    bytes   176 .. 191   int32 [4]    the same for each 32

Weights are multiplied as unsigned bytes level + offset; what that adds to a sum of products is taken off again by
starting the sum at -offset times the sum of q. NaN makes its group's scale NaN; infinity makes it infinite, with all
q 0: either way the result is NaN.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.jit import inner, shared
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
from quant.packed import BLOCK_K

GROUP = 32  # values that share a scale
BLOCK_GROUPS = BLOCK_K // GROUP
SCALES, SUMS_16, SUMS_32 = 128, 144, 176  # bytes from a block's start
ACTIVATION_BLOCK = 192  # bytes
LARGEST = 127.0
FLOAT_MAX = 3.4028234663852886e38
# Added to a float32 below 2**22, it leaves the nearest integer (halves to even) in the lowest bits.
ROUND, ROUND_BITS = 1.5 * 2.0**23, 0x4B400000


@shared
def k_blocks(k: int) -> int:
    """Blocks of 128 that hold `k` values."""
    return (k + BLOCK_K - 1) // BLOCK_K


@shared
def activation_bytes(k: int) -> int:
    """Bytes of one token's `k` values."""
    return k_blocks(k) * ACTIVATION_BLOCK


@intrinsic
def _quantise_group(typingctx, x, count, offset, block, group):  # type: ignore[no-untyped-def]
    """Group 0..3 of an activation block from 32 float32 at `x`, of which all from `count` on count as 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_group(builder, *args)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 5), codegen


# The Python signature of an intrinsic has one argument more than its callers give.
quantise_group: Any = _quantise_group


def _emit_group(builder: Any, x: Any, count: Any, offset: Any, block: Any, group: Any) -> None:
    halves = [
        load_lanes(builder, builder.add(x, i64(4 * at)), F32, tail_mask(builder, builder.sub(count, i64(at))))
        for at in (0, LANES)
    ]
    largest = _largest(builder, halves)
    scale = builder.fdiv(largest, ir.Constant(F32, LARGEST))
    inverse = splat(builder, _bounded(builder, builder.fdiv(ir.Constant(F32, LARGEST), largest)), VF)
    _store(builder, scale, block, SCALES, group, 4)
    sums = []
    for half, values in enumerate(halves):
        q = _round(builder, builder.fmul(values, inverse))
        _store(builder, builder.trunc(q, ir.VectorType(I8, LANES)), block, half * LANES, group, GROUP)
        total = _reduce(builder, "add", q)
        sums.append(builder.mul(total, builder.neg(builder.trunc(offset, I32))))
        _store(builder, sums[-1], block, SUMS_16 + 4 * half, group, 8)
    _store(builder, builder.add(*sums), block, SUMS_32, group, 4)


def _largest(builder: Any, halves: list[Any]) -> Any:
    """max|x|. Compared as integers, which order the bits of positive floats, and NaN above infinity."""
    first, second = (builder.and_(builder.bitcast(values, VI), splat_bits(0x7FFFFFFF)) for values in halves)
    larger = builder.select(builder.icmp_signed(">", first, second), first, second)
    return builder.bitcast(_reduce(builder, "smax", larger), F32)


def _bounded(builder: Any, inverse: Any) -> Any:
    """127 / max|x|, finite: for groups of zeros, and of values so small that the quotient overflows."""
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


def _store(builder: Any, value: Any, block: Any, offset: int, group: Any, stride: int) -> None:
    address = builder.add(builder.add(block, i64(offset)), builder.mul(group, i64(stride)))
    builder.store(value, builder.inttoptr(address, POINTER)).align = 1


@inner
def quantise(x, k, offset, out):  # type: ignore[no-untyped-def]
    """One token: float32 [k] at `x` to activation_bytes(k) at `out`."""
    for group in range(k_blocks(k) * BLOCK_GROUPS):
        block = out + group // BLOCK_GROUPS * ACTIVATION_BLOCK
        quantise_group(x + group * GROUP * 4, k - group * GROUP, offset, block, group % BLOCK_GROUPS)


@inner
def quantise_share(x, tokens, k, offset, out, part, parts):  # type: ignore[no-untyped-def]
    """One thread's tokens of float32 [tokens, k]; 1 when done."""
    for token in range(tokens * part // parts, tokens * (part + 1) // parts):
        quantise(x + token * k * 4, k, offset, out + token * activation_bytes(k))
    return 1

"""Packed weights unpacked to signed bytes integer * level, in the order of AMX's second operand.

A **chunk** is what a step multiplies with (tile_steps.py), four operands of 16 rows by 64 columns: a block of each of
two tiles, or one of `accurate`, whose products of up to 13 bits go in two bytes, 256 * high + low. First come both
operands of the first tile, or of the high bytes. It is unpacked in 8 portions, each between two products.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from quant.kernels.activations import offset_of
from quant.kernels.packed_dot import (
    BYTES,
    SHORTS,
    code_quad,
    group_integers,
    look_up,
    multiply_high,
    multiply_pairs,
    shuffle_bytes,
    unsigned_quad,
)
from quant.kernels.tile_instructions import TILE_BYTES, at, make_call
from quant.kernels.vector import I32, POINTER, VI, splat_bits
from quant.packed import ACCURATE, BLOCK_K, FAST, INTEGER_STEP, LINE, LOWEST_INTEGER, Q8, PackedFormat

PORTIONS = 8
CHUNK_BYTES = 4 * TILE_BYTES
CHUNK_TILES = {FAST.name: 2, ACCURATE.name: 1, Q8.name: 2}


def emit_portion(builder: Any, fmt: PackedFormat, number: int, blocks: list[Any], target: Any) -> None:
    """Unpack portion `number` of a chunk, whose blocks' addresses are given, to the address `target`."""
    each = BLOCK_K * CHUNK_TILES[fmt.name] // PORTIONS
    index, column = divmod(number * each, BLOCK_K)
    write = _WRITERS[fmt.name](builder, fmt, blocks[index], column // fmt.group)
    for quad in range(column // 4, (column + each) // 4):
        for half, values in enumerate(write(quad), index):
            place = at(builder, target, 2 * half * TILE_BYTES + quad * LINE)
            builder.store(builder.bitcast(values, BYTES), place).align = LINE


def make_unpack(fmt: PackedFormat) -> Any:
    """Intrinsic of (blocks' addresses..., target): a whole chunk."""

    def emit(builder: Any, *args: Any) -> None:
        *blocks, target = args
        for number in range(PORTIONS):
            emit_portion(builder, fmt, number, blocks, target)

    return make_call(f"unpack.{fmt.name}", CHUNK_TILES[fmt.name] + 1, emit)


Write = Callable[[int], list[Any]]  # of four columns' number: their bytes


def _twice(builder: Any, word: Any) -> Any:
    """The lower halves of 16 words in both halves."""
    low = builder.and_(word, splat_bits(0xFFFF))
    return builder.bitcast(builder.or_(low, builder.shl(low, splat_bits(16))), SHORTS)


def _shorts(value: int) -> ir.Constant:
    return ir.Constant(SHORTS, [value] * 32)


def _write_fast(builder: Any, fmt: PackedFormat, block: Any, group: int) -> Write:
    """integer * (code - 8) from |integer| * code, which fits an unsigned byte, so one 16-bit product makes two.

    A negative integer turns the codes round: -s (code - 8) = s ((15 - code) - 7). What is needed of an integer is
    looked up from its 4 bits c, once in each byte of a row. Codes in upper halves of bytes are multiplied where they
    are: 16 code * 4096 |integer| is what is wanted times 65536.
    """
    word = builder.load(builder.inttoptr(block, POINTER), typ=VI, align=1)
    moved = builder.bitcast(builder.lshr(word, splat_bits(4 * group)) if group else word, BYTES)
    first_bytes = ir.Constant(VI, [0x01010101 * (4 * row) for row in range(4)] * 4)
    c = builder.and_(shuffle_bytes(builder, moved, builder.bitcast(first_bytes, BYTES)), ir.Constant(BYTES, [15] * 64))
    integers = [LOWEST_INTEGER["odd4"] + INTEGER_STEP["odd4"] * number for number in range(16)]
    turn = look_up(builder, c, [255 if s < 0 else 0 for s in integers])
    middle = look_up(builder, c, [fmt.zero * s if s > 0 else (15 - fmt.zero) * -s for s in integers])
    size = builder.bitcast(look_up(builder, c, [abs(s) for s in integers]), SHORTS)
    low, high = builder.and_(size, _shorts(0xFF)), builder.and_(builder.shl(size, _shorts(4)), _shorts(0xF000))

    def write(number: int) -> list[Any]:
        line = builder.load(at(builder, block, fmt.header_bytes + LINE * (number // 2)), typ=BYTES, align=1)
        turned = builder.bitcast(builder.xor(line, turn), SHORTS)
        if number % 2:
            products = multiply_high(builder, builder.and_(turned, _shorts(0xF0F0)), high)
        else:
            products = builder.mul(builder.and_(turned, _shorts(0x0F0F)), low)
        return [builder.sub(builder.bitcast(products, BYTES), middle)]

    return write


def _write_accurate(builder: Any, fmt: PackedFormat, block: Any, group: int) -> Write:
    """The upper and the lower bytes of integer * level.

    Products of even and of odd bytes, of level + offset, come from one instruction that adds up pairs: the integer is
    in one byte of each pair, and 0 in the other.
    """
    s, offset = group_integers(builder, fmt, block, group), offset_of(fmt)
    byte = builder.and_(s, splat_bits(0xFF))
    of_even = builder.or_(byte, builder.shl(byte, splat_bits(16)))
    factors = [builder.bitcast(factor, BYTES) for factor in (of_even, builder.shl(of_even, splat_bits(8)))]
    too_much = builder.mul(_twice(builder, s), _shorts(offset))

    def write(number: int) -> list[Any]:
        values = unsigned_quad(builder, fmt, block, number)
        even, odd = (builder.sub(multiply_pairs(builder, values, factor), too_much) for factor in factors)
        high = _merge(builder, builder.lshr(even, _shorts(8)), odd)
        return [high, _merge(builder, even, builder.shl(odd, _shorts(8)))]

    return write


def _merge(builder: Any, even: Any, odd: Any) -> Any:
    """Even bytes of one vector, odd ones of the other. LLVM would take a shuffle, which is three times as slow."""
    mask, even, odd = (builder.bitcast(vector, VI) for vector in (_shorts(0xFF), even, odd))
    kind = ir.FunctionType(VI, [VI, VI, VI, I32])
    select = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.pternlog.d.512")
    return builder.call(select, [mask, even, odd, ir.Constant(I32, 0xCA)])


def _write_q8(builder: Any, fmt: PackedFormat, block: Any, group: int) -> Write:
    zero = ir.Constant(BYTES, [fmt.zero] * 64)
    return lambda number: [builder.xor(code_quad(builder, fmt, block, number), zero)]


_WRITERS = {"fast": _write_fast, "accurate": _write_accurate, "q8": _write_q8}

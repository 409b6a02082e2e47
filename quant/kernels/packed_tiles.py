"""Packed rows times many tokens with AMX, whose instructions multiply tiles of bytes: 16 rows by 64 columns each.

A block of 16 rows by 128 columns is unpacked once to signed bytes integer * level, in the order of AMX's second
operand, and multiplied with up to 32 tokens at a time. `accurate` has products of up to 13 bits: they go in two bytes,
256 * high + low. The block's sums are those of packed_dot.py, exactly, and so is what follows: one product with
the scales, in order of k. So it does not matter which of the two ways a token takes.

Four steps, a function each: unpack, multiply (to int32 [tokens, 32]), then scale and add up (to float32 [tokens, 128]).
The next block is unpacked, and the last one scaled, while the tile unit multiplies.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.isa import x86_has
from quant.kernels.activations import record_bytes, record_of, scale_of
from quant.kernels.decode import ACCURATE_CODE, FAST_CODE
from quant.kernels.jit import inner, shared
from quant.kernels.packed_dot import (
    BYTES,
    SCALE_BITS,
    SHORTS,
    SLOTS,
    block_bytes,
    code_quad,
    group_integers,
    look_up,
    prefetch,
)
from quant.kernels.tiles import floats, integers
from quant.kernels.vector import (
    F32,
    I8,
    I64,
    POINTER,
    VF,
    VI,
    i64,
    multiply_add,
    splat,
    splat_bits,
)
from quant.packed import ACCURATE, BLOCK_K, FAST, LINE, Q8, TILE_ROWS, PackedFormat

HAS_TILES = x86_has("amx-int8") and x86_has("avx512vnni")
TILE_TOKENS = 5  # from here on tiles are faster than packed_dot.py's four tokens at a time
PAIR_ROWS = 2 * TILE_ROWS  # weight rows multiplied together
TOKENS = 32  # at a time
TILE_K = 64  # columns of a tile
TILE_BYTES = TILE_ROWS * TILE_K
UNPACKED = 2 * (BLOCK_K // TILE_K) * TILE_BYTES  # of a block: high and low bytes
AHEAD = 1  # blocks between an unpacked one and its prefetch
# Scratch: two blocks of each of two tiles, and the sums of two blocks.
SUMS_BYTES = TOKENS * PAIR_ROWS * 4
SUMS = 4 * UNPACKED
SCRATCH_BYTES = SUMS + 2 * SUMS_BYTES


def _function(module: Any, name: str, count: int, emit: Callable[..., None]) -> Any:
    """A function of `count` int64 that is never inlined; emit(builder, *arguments) writes it at its first use."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * count)
    function = cgutils.get_or_insert_function(module, kind, f"dsr1.tiles.{name}")
    if function.is_declaration:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        emit(builder, *function.args)
        builder.ret_void()
    return function


def _make(name: str, count: int, emit: Callable[..., None]) -> Any:
    """Intrinsic of a tuple of `count` int64 that calls the function that `emit` writes."""

    @intrinsic
    def call(typingctx, arguments):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = [builder.extract_value(args[0], number) for number in range(count)]
            builder.call(_function(builder.module, name, count, emit), values)
            return context.get_dummy_value()

        return types.void(types.UniTuple(types.int64, count)), codegen

    return call


def _void(builder: Any, name: str, args: list[Any]) -> None:
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


def _at(builder: Any, base: Any, offset: int) -> Any:
    return builder.inttoptr(builder.add(base, i64(offset)), POINTER)


def _tile(number: int) -> ir.Constant:
    return ir.Constant(I8, number)


@intrinsic
def _configure_tiles(typingctx):  # type: ignore[no-untyped-def]
    """Let all 8 tiles be 16 rows of 64 bytes: before a thread uses them."""
    config = [1, *[0] * 15, *[TILE_K, 0] * 8, *[0] * 16, *[TILE_ROWS] * 8, *[0] * 8]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(I8, 64))
        builder.store(ir.Constant(ir.ArrayType(I8, 64), config), memory)
        _void(builder, "ldtilecfg", [memory])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _release_tiles(typingctx):  # type: ignore[no-untyped-def]
    """After it has used them: the system then need not keep them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _void(builder, "tilerelease", [])
        return context.get_dummy_value()

    return types.void(), codegen


def _make_multiply(a_tiles: int, low_is_unsigned: bool) -> Any:
    """(a, stride, b0, b1, sums): int32 [16 a_tiles, 32] at `sums` = tokens of a block times two unpacked ones.

    a: address of the first token's 128 bytes, the others' are `stride` apart. b0 gives columns 0..15 of the sums, b1
    the others; with `low_is_unsigned`, b1's bytes are unsigned.
    """

    def emit(builder: Any, a: Any, stride: Any, b0: Any, b1: Any, sums: Any) -> None:
        for number in range(2 * a_tiles):
            _void(builder, "tilezero", [_tile(number)])
        for step in range(BLOCK_K // TILE_K):
            for number, b in enumerate((b0, b1)):
                _void(builder, "tileloadd64", [_tile(6 + number), _at(builder, b, step * TILE_BYTES), i64(TILE_K)])
            for row in range(a_tiles):
                first = builder.add(a, builder.mul(stride, i64(row * TILE_ROWS)))
                _void(builder, "tileloadd64", [_tile(4 + row), _at(builder, first, step * TILE_K), stride])
                for number, product in enumerate(("tdpbssd", "tdpbsud" if low_is_unsigned else "tdpbssd")):
                    _void(builder, product, [_tile(2 * row + number), _tile(4 + row), _tile(6 + number)])
        for number in range(2 * a_tiles):
            place = number // 2 * TILE_ROWS * PAIR_ROWS * 4 + number % 2 * LINE
            _void(builder, "tilestored64", [_tile(number), _at(builder, sums, place), i64(PAIR_ROWS * 4)])

    return _make(f"multiply.{a_tiles}.{low_is_unsigned}", 5, emit)


def _make_unpack(fmt: PackedFormat) -> Any:
    """(block, later, target): a block's integer * level as signed bytes [32, 16 rows, 4 columns] at `target`.

    Of `accurate` the upper bytes of 16-bit products, and the lower ones, unsigned, after them. `later`: address of a
    block to prefetch.
    """

    def emit(builder: Any, block: Any, later: Any, target: Any) -> None:
        for offset in range(0, fmt.block_bytes, LINE):
            prefetch(builder, builder.add(later, i64(offset)))
        quads = fmt.group // 4
        for group in range(BLOCK_K // fmt.group):
            write = _WRITERS[fmt.name](builder, fmt, block, group)
            for number in range(group * quads, (group + 1) * quads):
                for half, values in enumerate(write(code_quad(builder, fmt, block, number))):
                    place = _at(builder, target, half * UNPACKED // 2 + number * LINE)
                    builder.store(builder.bitcast(values, BYTES), place).align = LINE

    return _make(f"unpack.{fmt.name}", 3, emit)


Write = Callable[[Any], list[Any]]


def _twice(builder: Any, word: Any) -> Any:
    """The lower halves of 16 words in both halves."""
    low = builder.and_(word, splat_bits(0xFFFF))
    return builder.bitcast(builder.or_(low, builder.shl(low, splat_bits(16))), SHORTS)


def _shorts(value: int) -> ir.Constant:
    return ir.Constant(SHORTS, [value] * 32)


def _write_fast(builder: Any, fmt: PackedFormat, block: Any, group: int) -> Write:
    """integer * (code - 8) from |integer| * code, which fits an unsigned byte, so one 16-bit product makes two.

    A negative integer turns the codes round: -s (code - 8) = s ((15 - code) - 7).
    """
    s = _twice(builder, group_integers(builder, fmt, block, group))
    negative = builder.ashr(s, _shorts(15))
    size = builder.sub(builder.xor(s, negative), negative)
    turn = builder.and_(negative, _shorts(0x0F0F))
    middle = builder.add(builder.mul(size, _shorts(fmt.zero)), builder.and_(s, negative))
    middles = builder.bitcast(builder.or_(middle, builder.shl(middle, _shorts(8))), BYTES)

    def write(codes: Any) -> list[Any]:
        turned = builder.xor(builder.bitcast(codes, SHORTS), turn)
        products = builder.bitcast(builder.mul(turned, size), BYTES)
        return [builder.sub(products, middles)]

    return write


def _write_accurate(builder: Any, fmt: PackedFormat, block: Any, group: int) -> Write:
    """The upper and the lower bytes of integer * level."""
    assert fmt.levels is not None
    s, eight, levels = _twice(builder, group_integers(builder, fmt, block, group)), _shorts(8), list(fmt.levels)
    low_bytes = _shorts(0xFF)

    def write(codes: Any) -> list[Any]:
        level = builder.bitcast(look_up(builder, codes, levels), SHORTS)
        even = builder.mul(builder.ashr(builder.shl(level, eight), eight), s)
        odd = builder.mul(builder.ashr(level, eight), s)
        high = builder.or_(builder.lshr(even, eight), builder.and_(odd, _shorts(0xFF00)))
        low = builder.or_(builder.and_(even, low_bytes), builder.shl(odd, eight))
        return [high, low]

    return write


def _write_q8(builder: Any, fmt: PackedFormat, block: Any, group: int) -> Write:
    return lambda codes: [builder.xor(codes, ir.Constant(BYTES, [fmt.zero] * 64))]


_WRITERS = {"fast": _write_fast, "accurate": _write_accurate, "q8": _write_q8}


def _emit_scale(builder: Any, count: Any, sums: Any, block_scales: tuple[Any, Any], x_scale: Any, out: Any) -> None:
    """out float32 [count, 128] += sums times d and the token's scale. With one header, sums are 256 * high + low."""
    first, second = block_scales
    ds = [_scales_of(builder, header) for header in ((first,) if second is None else (first, second))]
    entry, loop, end = builder.block, builder.append_basic_block("token"), builder.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(I64)
    line = builder.add(sums, builder.mul(at, i64(PAIR_ROWS * 4)))
    place = builder.add(out, builder.mul(at, i64(SLOTS * LINE)))
    scale = builder.load(builder.inttoptr(builder.add(x_scale, builder.mul(at, i64(4))), POINTER), typ=F32)
    scale = splat(builder, scale, VF)
    integers = [builder.load(_at(builder, line, LINE * half), typ=VI, align=LINE) for half in (0, 1)]
    if second is None:
        integers = [builder.add(builder.shl(integers[0], splat_bits(8)), integers[1])]
    for half, (d, integer) in enumerate(zip(ds, integers, strict=True)):
        total = builder.load(_at(builder, place, LINE * half), typ=VF, align=LINE)
        later = multiply_add(builder, builder.sitofp(integer, VF), builder.fmul(d, scale), total)
        builder.store(later, _at(builder, place, LINE * half)).align = LINE
    following = builder.add(at, i64(1))
    at.add_incoming(i64(0), entry)
    at.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)


def _scales_of(builder: Any, header: Any) -> Any:
    word = builder.load(builder.inttoptr(header, POINTER), typ=VI, align=LINE)
    return builder.bitcast(builder.and_(word, splat_bits(SCALE_BITS)), VF)


def _emit_scale_two(builder: Any, count: Any, sums: Any, first: Any, second: Any, x_scale: Any, out: Any) -> None:
    _emit_scale(builder, count, sums, (first, second), x_scale, out)


def _emit_scale_joined(builder: Any, count: Any, sums: Any, header: Any, x_scale: Any, out: Any) -> None:
    _emit_scale(builder, count, sums, (header, None), x_scale, out)


# The Python signatures of intrinsics have one argument more than their callers give.
configure_tiles: Any = _configure_tiles
release_tiles: Any = _release_tiles
_multiply_16, _multiply_32 = (_make_multiply(tiles, False) for tiles in (1, 2))
_multiply_16_joined, _multiply_32_joined = (_make_multiply(tiles, True) for tiles in (1, 2))
_unpack_fast, _unpack_accurate, _unpack_q8 = (_make_unpack(fmt) for fmt in (FAST, ACCURATE, Q8))
_scale_two = _make("scale.two", 6, _emit_scale_two)
_scale_joined = _make("scale.joined", 5, _emit_scale_joined)


@inner
def _unpack(code, block, later, target):  # type: ignore[no-untyped-def]
    if code == FAST_CODE:
        _unpack_fast((block, later, target))
    elif code == ACCURATE_CODE:
        _unpack_accurate((block, later, target))
    else:
        _unpack_q8((block, later, target))


@inner
def _unpack_pair(code, table, step, pairs, blocks, target):  # type: ignore[no-untyped-def]
    """Both tiles of a pair of slots, the block of a step: steps go through all pairs, block by block."""
    slots, size = integers(table, (2 * SLOTS,)), block_bytes(code)
    block, pair = step // pairs, step % pairs
    for tile in range(2):
        slot = 2 * pair + tile
        if slots[slot] != 0:
            later = block + AHEAD
            start = slots[slot] + later * size if later < blocks else slots[SLOTS + slot] + (later - blocks) * size
            _unpack(code, slots[slot] + block * size, start, target + tile * UNPACKED)


@inner
def _multiply(code, a, stride, count, unpacked, sums):  # type: ignore[no-untyped-def]
    """Up to 32 tokens. Of `accurate` with one tile's high and low bytes, else with both tiles."""
    if code == ACCURATE_CODE:
        if count > TILE_ROWS:
            _multiply_32_joined((a, stride, unpacked, unpacked + UNPACKED // 2, sums))
        else:
            _multiply_16_joined((a, stride, unpacked, unpacked + UNPACKED // 2, sums))
    elif count > TILE_ROWS:
        _multiply_32((a, stride, unpacked, unpacked + UNPACKED, sums))
    else:
        _multiply_16((a, stride, unpacked, unpacked + UNPACKED, sums))


@inner
def _scale(code, work, sums):  # type: ignore[no-untyped-def]
    """work: tokens, headers of the two blocks (or of the one), first scale, first result."""
    count, first, second, x_scale, out = work
    if code == ACCURATE_CODE:
        _scale_joined((count, sums, first, x_scale, out))
    else:
        _scale_two((count, sums, first, second, x_scale, out))


@inner
def _pairs_of(table):  # type: ignore[no-untyped-def]
    """Pairs of slots up to the last tile."""
    slots = integers(table, (2 * SLOTS,))
    last = SLOTS - 1
    while last > 0 and slots[last] == 0:
        last -= 1
    return last // 2 + 1


@inner
def multiply_tiles(inputs, table, first, count, blocks, out, scratch):  # type: ignore[no-untyped-def]
    """out float32 [count, 128] = rows `first` on of `inputs` times the tiles of a table (packed_rows.py).

    Rows of inputs up to the next multiple of 32 are read. scratch, out: at cache lines.
    """
    code, size, stride = inputs.code, block_bytes(inputs.code), record_bytes(inputs.k)
    halves, pairs = 2 if code == ACCURATE_CODE else 1, _pairs_of(table)
    slots, steps = integers(table, (2 * SLOTS,)), blocks * pairs
    floats(out, (count * SLOTS * TILE_ROWS,))[:] = 0
    _unpack_pair(code, table, 0, pairs, blocks, scratch)
    number, unpacked_steps = 0, 1
    waiting = (0, 0, 0, 0, 0)  # what is multiplied and not yet scaled
    for step in range(steps):
        block, pair = step // pairs, step % pairs
        unpacked = scratch + step % 2 * 2 * UNPACKED
        for token in range(0, count, TOKENS):
            tokens, row = min(TOKENS, count - token), first + token
            x_scale = scale_of(inputs, row) + block * inputs.rows * 4
            for half in range(halves):
                slot, other = 2 * pair + half, 2 * pair + 1
                if slots[slot] == 0:
                    continue
                sums, before = SUMS + number % 2 * SUMS_BYTES, SUMS + (number + 1) % 2 * SUMS_BYTES
                a = record_of(inputs, row) + block * BLOCK_K
                _multiply(code, a, stride, tokens, unpacked + half * UNPACKED, scratch + sums)
                if unpacked_steps == step + 1 and unpacked_steps < steps:
                    _unpack_pair(code, table, step + 1, pairs, blocks, scratch + (step + 1) % 2 * 2 * UNPACKED)
                    unpacked_steps += 1
                if number > 0:
                    _scale(code, waiting, scratch + before)
                headers = slots[slot] + block * size, slots[other if slots[other] != 0 else slot] + block * size
                waiting = (tokens, headers[0], headers[1], x_scale, out + (token * SLOTS + slot) * LINE)
                number += 1
        if unpacked_steps == step + 1 and unpacked_steps < steps:  # the pair was empty
            _unpack_pair(code, table, step + 1, pairs, blocks, scratch + (step + 1) % 2 * 2 * UNPACKED)
            unpacked_steps += 1
    _scale(code, waiting, scratch + SUMS + (number + 1) % 2 * SUMS_BYTES)


@shared
def uses_tiles(granted: int, tokens: int) -> bool:
    """Whether this many tokens of an expert, or of a linear, are multiplied with tiles where they are granted."""
    return granted != 0 and tokens >= TILE_TOKENS

"""Packed rows times many tokens with AMX, whose instructions multiply tiles of bytes: 16 rows by 64 columns each.

A block of 16 rows by 128 columns is unpacked once to signed bytes integer * level, in the order of AMX's second
operand, and multiplied with up to 32 tokens at a time. `accurate` has products of up to 13 bits: they go in two bytes,
256 * high + low. The block's sums are those of packed_dot.py, exactly, and so is what follows: one product with
the scales, in order of k. So it does not matter which of the two ways a token takes.

Four steps, a function each: unpack, multiply, store (int32 [tokens, 32]), scale and add up (to float32 [tokens, 128]).
The next block is unpacked, and the last one scaled, while the tile unit multiplies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.isa import x86_has
from quant.kernels.activations import Inputs, record_bytes, record_of, scale_of
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
# Scratch: what two steps unpack, and the sums of one.
SUMS_BYTES = TOKENS * PAIR_ROWS * 4
SUMS = 4 * UNPACKED
SCRATCH_BYTES = SUMS + SUMS_BYTES


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


def _make_products(a_tiles: int, low_is_unsigned: bool) -> Any:
    """(a, stride, b0, b1): into tile registers, int32 [16 a_tiles, 32] = tokens of a block times two unpacked ones.

    a: address of the first token's 128 bytes, the others' are `stride` apart. b0 gives columns 0..15 of the sums, b1
    the others; with `low_is_unsigned`, b1's bytes are unsigned.
    """

    def emit(builder: Any, a: Any, stride: Any, b0: Any, b1: Any) -> None:
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

    return _make(f"products.{a_tiles}.{low_is_unsigned}", 4, emit)


def _make_store(a_tiles: int) -> Any:
    """(sums): the products of the tile registers to int32 [16 a_tiles, 32]."""

    def emit(builder: Any, sums: Any) -> None:
        for number in range(2 * a_tiles):
            place = number // 2 * TILE_ROWS * PAIR_ROWS * 4 + number % 2 * LINE
            _void(builder, "tilestored64", [_tile(number), _at(builder, sums, place), i64(PAIR_ROWS * 4)])

    return _make(f"store.{a_tiles}", 1, emit)


def _make_unpack(fmt: PackedFormat) -> Any:
    """(block, later, target): a block's integer * level as signed bytes [32, 16 rows, 4 columns] at `target`.

    Of `accurate` the upper bytes of 16-bit products, and the lower ones, unsigned, after them. `later`: address of a
    block to prefetch.
    """

    def emit(builder: Any, block: Any, later: Any, target: Any) -> None:
        for offset in range(0, fmt.header_bytes, LINE):
            prefetch(builder, builder.add(later, i64(offset)))
        quads = fmt.group // 4
        for group in range(BLOCK_K // fmt.group):
            write = _WRITERS[fmt.name](builder, fmt, block, group)
            for number in range(group * quads, (group + 1) * quads):
                if number * fmt.bits % 8 == 0:
                    prefetch(builder, builder.add(later, i64(fmt.header_bytes + LINE * number * fmt.bits // 8)))
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


def _emit_scale(builder: Any, count: Any, sums: Any, headers: list[Any], x_scale: Any, outs: list[Any]) -> None:
    """outs float32 [count, 128] += sums times d and the token's scale. With one header, sums are 256 * high + low."""
    ds = [_scales_of(builder, header) for header in headers]
    entry, loop, end = builder.block, builder.append_basic_block("token"), builder.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(I64)
    line, row = builder.add(sums, builder.mul(at, i64(PAIR_ROWS * 4))), builder.mul(at, i64(SLOTS * LINE))
    scale = builder.load(builder.inttoptr(builder.add(x_scale, builder.mul(at, i64(4))), POINTER), typ=F32)
    scale = splat(builder, scale, VF)
    integers = [builder.load(_at(builder, line, LINE * half), typ=VI, align=LINE) for half in (0, 1)]
    if len(headers) == 1:
        integers = [builder.add(builder.shl(integers[0], splat_bits(8)), integers[1])]
    factors = [builder.fmul(d, scale) for d in ds]
    places = [builder.inttoptr(builder.add(out, row), POINTER) for out in outs]
    totals = [builder.load(place, typ=VF, align=LINE) for place in places]
    # the first one last: where both are one, there is no second
    for place, integer, factor, total in reversed(list(zip(places, integers, factors, totals, strict=True))):
        builder.store(multiply_add(builder, builder.sitofp(integer, VF), factor, total), place).align = LINE
    following = builder.add(at, i64(1))
    at.add_incoming(i64(0), entry)
    at.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)


def _scales_of(builder: Any, header: Any) -> Any:
    word = builder.load(builder.inttoptr(header, POINTER), typ=VI, align=LINE)
    return builder.bitcast(builder.and_(word, splat_bits(SCALE_BITS)), VF)


def _emit_scale_two(builder: Any, count: Any, sums: Any, first: Any, second: Any, x_scale: Any, *outs: Any) -> None:
    out, skip = outs
    _emit_scale(builder, count, sums, [first, second], x_scale, [out, builder.add(out, skip)])


def _emit_scale_joined(builder: Any, count: Any, sums: Any, header: Any, x_scale: Any, out: Any) -> None:
    _emit_scale(builder, count, sums, [header], x_scale, [out])


# The Python signatures of intrinsics have one argument more than their callers give.
configure_tiles: Any = _configure_tiles
release_tiles: Any = _release_tiles
_products_16, _products_32 = (_make_products(tiles, False) for tiles in (1, 2))
_products_16_joined, _products_32_joined = (_make_products(tiles, True) for tiles in (1, 2))
_store_16, _store_32 = (_make_store(tiles) for tiles in (1, 2))
_unpack_fast, _unpack_accurate, _unpack_q8 = (_make_unpack(fmt) for fmt in (FAST, ACCURATE, Q8))
_scale_two = _make("scale.two", 7, _emit_scale_two)
_scale_joined = _make("scale.joined", 5, _emit_scale_joined)


@inner
def _unpack(code, block, later, target):  # type: ignore[no-untyped-def]
    if code == FAST_CODE:
        _unpack_fast((block, later, target))
    elif code == ACCURATE_CODE:
        _unpack_accurate((block, later, target))
    else:
        _unpack_q8((block, later, target))


class Work(NamedTuple):
    """One call. used: address of the int64 numbers of the table's slots that hold a tile; steps: of each block."""

    inputs: Inputs
    table: int
    used: int
    count: int
    blocks: int
    steps: int
    first: int
    out: int
    scratch: int


@inner
def _find_used(table):  # type: ignore[no-untyped-def]
    """Write down, behind a table, which slots hold a tile; returns how many."""
    slots = integers(table, (3 * SLOTS,))
    count = 0
    for slot in range(SLOTS):
        if slots[slot] != 0:
            slots[2 * SLOTS + count] = slot
            count += 1
    return count


@inner
def _slots_of(work, step):  # type: ignore[no-untyped-def]
    """The two slots of a step; of `accurate`, whose tile has two bytes a weight, it is one."""
    used = integers(work.used, (SLOTS,))
    if work.inputs.code == ACCURATE_CODE:
        return used[step], used[step]
    last = 2 * step + 1 if 2 * step + 1 < work.count else 2 * step
    return used[2 * step], used[last]


@inner
def _unpack_step(work, block, step, target):  # type: ignore[no-untyped-def]
    slots, size = integers(work.table, (2 * SLOTS,)), block_bytes(work.inputs.code)
    first, second = _slots_of(work, step)
    later = block + AHEAD
    for number in range(1 if first == second else 2):
        slot = first if number == 0 else second
        tile = slots[slot]
        start = tile + later * size if later < work.blocks else slots[SLOTS + slot] + (later - work.blocks) * size
        _unpack(work.inputs.code, tile + block * size, start, target + number * UNPACKED)


@inner
def _products(work, block, token, tokens, unpacked):  # type: ignore[no-untyped-def]
    """Up to 32 tokens times what a step has unpacked, in the tile registers."""
    a = record_of(work.inputs, work.first + token) + block * BLOCK_K
    stride = record_bytes(work.inputs.k)
    if work.inputs.code == ACCURATE_CODE:
        if tokens > TILE_ROWS:
            _products_32_joined((a, stride, unpacked, unpacked + UNPACKED // 2))
        else:
            _products_16_joined((a, stride, unpacked, unpacked + UNPACKED // 2))
    elif tokens > TILE_ROWS:
        _products_32((a, stride, unpacked, unpacked + UNPACKED))
    else:
        _products_16((a, stride, unpacked, unpacked + UNPACKED))


@inner
def _store(tokens, sums):  # type: ignore[no-untyped-def]
    if tokens > TILE_ROWS:
        _store_32((sums,))
    else:
        _store_16((sums,))


@inner
def _scale(work, block, step, token, tokens, sums):  # type: ignore[no-untyped-def]
    """Add what a step's sums come to. Of `fast` and `q8`, its two slots' results lie side by side, or are one's."""
    slots, offset = integers(work.table, (SLOTS,)), block * block_bytes(work.inputs.code)
    first, second = _slots_of(work, step)
    x_scale = scale_of(work.inputs, work.first + token) + block * work.inputs.rows * 4
    out = work.out + (token * SLOTS + first) * LINE
    if work.inputs.code == ACCURATE_CODE:
        _scale_joined((tokens, sums, slots[first] + offset, x_scale, out))
    else:
        skip = (second - first) * LINE  # 0 where there is no second one
        _scale_two((tokens, sums, slots[first] + offset, slots[second] + offset, x_scale, out, skip))


@inner
def multiply_tiles(inputs, table, first, size, blocks, out, scratch):  # type: ignore[no-untyped-def]
    """out float32 [size, 128] = rows `first` on of `inputs` times the tiles of a table (packed_rows.py).

    Rows of inputs up to the next multiple of 32 are read. scratch, out: at cache lines.

    A product's results are stored only after something else was done meanwhile: stores that wait hold up all loads
    from addresses that look alike.
    """
    count = _find_used(table)
    steps = count if inputs.code == ACCURATE_CODE else (count + 1) // 2
    work = Work(inputs, table, table + 2 * SLOTS * 8, count, blocks, steps, first, out, scratch)
    floats(out, (size * SLOTS * TILE_ROWS,))[:] = 0
    unpacked, other, sums = scratch, scratch + 2 * UNPACKED, scratch + SUMS
    _unpack_step(work, 0, 0, unpacked)
    _products(work, 0, 0, min(TOKENS, size), unpacked)
    block, step = 0, 0
    while block < blocks:
        next_block, next_step = (block, step + 1) if step + 1 < steps else (block + 1, 0)
        if next_block < blocks:
            _unpack_step(work, next_block, next_step, other)
        for token in range(0, size, TOKENS):
            tokens = min(TOKENS, size - token)
            _store(tokens, sums)
            if token + TOKENS < size:
                _products(work, block, token + TOKENS, min(TOKENS, size - token - TOKENS), unpacked)
            elif next_block < blocks:
                _products(work, next_block, 0, min(TOKENS, size), other)
            _scale(work, block, step, token, tokens, sums)
        block, step = next_block, next_step
        unpacked, other = other, unpacked


@shared
def uses_tiles(granted: int, tokens: int) -> bool:
    """Whether this many tokens of an expert, or of a linear, are multiplied with tiles where they are granted."""
    return granted != 0 and tokens >= TILE_TOKENS

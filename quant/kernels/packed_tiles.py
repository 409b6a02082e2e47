"""Packed rows times many tokens with AMX, whose instructions multiply tiles of bytes: 16 rows by 64 columns each.

A block of 16 rows by 128 columns is unpacked once to signed bytes integer * level, in the order of AMX's second
operand, and multiplied with up to 32 tokens at a time. `accurate` has products of up to 13 bits: they go in two bytes,
256 * high + low. The block's sums are those of packed_dot.py, exactly, and so is what follows: one product with
the scales, in order of k. So it does not matter which of the two ways a token takes.

Unpacked weights and tokens are multiplied in tile registers, stored as int32, scaled, and added to float32 results.
The tile unit multiplies for 16 cycles each time: meanwhile the last products are scaled, instruction by instruction.
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
from quant.kernels.leaf import Leaf
from quant.kernels.packed_dot import (
    BYTES,
    ROW_BYTES,
    SCALE_BITS,
    SHORTS,
    SLOTS,
    block_bytes,
    code_quad,
    group_integers,
    look_up,
    multiply_high,
    shuffle_bytes,
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
    prefetch,
    splat,
    splat_bits,
)
from quant.packed import ACCURATE, BLOCK_K, FAST, INTEGER_STEP, LINE, LOWEST_INTEGER, Q8, TILE_ROWS, PackedFormat

HAS_TILES = x86_has("amx-int8") and x86_has("avx512vnni")
TILE_TOKENS = 5  # from here on tiles are faster than packed_dot.py's four tokens at a time
PAIR_ROWS = 2 * TILE_ROWS  # weight rows multiplied together
TOKENS = 32  # at a time
TILE_K = 64  # columns of a tile
TILE_BYTES = TILE_ROWS * TILE_K
UNPACKED = 2 * (BLOCK_K // TILE_K) * TILE_BYTES  # of a block: high and low bytes
APART = UNPACKED + 5 * LINE  # bytes from one unpacked tile to the next: a multiple of 4 KiB would make them look alike
GROUP_STEPS = 2  # steps of many tokens that go through all blocks together, so that their results stay in L1
AHEAD = 1  # blocks between an unpacked one and its prefetch
PREFETCHED = 18  # lines of a block that are prefetched between products: all of a 4-bit one
# Scratch: what two steps unpack, up to four tiles each; the sums of one; where those go.
STEP_BYTES = 4 * APART
SUMS = 2 * STEP_BYTES
HALF_SUMS = TILE_ROWS * PAIR_ROWS * 4  # of 16 tokens and two tiles, or of 16 more tokens
TARGETS = SUMS + 2 * HALF_SUMS
WASTE = TARGETS + 3 * SLOTS * 8  # results that nobody reads
SCRATCH_BYTES = WASTE + TOKENS * ROW_BYTES


def _make(name: str, count: int, emit: Callable[..., None]) -> Any:
    """Intrinsic of a tuple of `count` int64 that calls the function that `emit` writes."""
    leaf = Leaf(f"tiles.{name}", count, emit)

    @intrinsic
    def call(typingctx, arguments):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = [builder.extract_value(args[0], number) for number in range(count)]
            builder.call(leaf.declare(builder.module), values)
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


def _make_products(a_tiles: int, b_tiles: int, is_joined: bool) -> Any:
    """(a, stride, b, sums, x_scale, out, targets): products of a block of tokens and unpacked tiles into registers.

    a: address of the first token's 128 bytes, the others' are `stride` apart. b: address of the first unpacked tile;
    the others follow APART bytes apart. `is_joined`: each has signed high bytes, and unsigned low ones after them.
    There are 4 results: token tiles times b tiles, or times halves of them.

    Meanwhile the sums of the products before are scaled and added to `out` (_add_scaled), and blocks that are unpacked
    later are prefetched, a line at a time: more at once than a core can wait for would hold it up.
    """
    operands = [(tile, half) for tile in range(b_tiles // (1 + is_joined)) for half in range(1 + is_joined)]
    tokens, columns = a_tiles * TILE_ROWS, b_tiles // (1 + is_joined)

    def emit(builder: Any, *args: Any) -> None:
        a, stride, b, sums, x_scale, out, targets = args
        chunks = tokens * columns // (2 * len(operands) * a_tiles)
        lines = [(token, column) for column in range(columns) for token in range(tokens)]
        factors = [_scales_of(builder, _load_address(builder, targets, 8 * column)) for column in range(columns)]
        places = [builder.add(out, _load_address(builder, targets, 8 * (SLOTS + column))) for column in range(columns)]
        laters = [_load_address(builder, targets, 8 * (2 * SLOTS + column)) for column in range(columns)]
        for number in range(4):
            _void(builder, "tilezero", [_tile(number)])
        for step in range(BLOCK_K // TILE_K):
            for row in range(a_tiles):
                first = builder.add(a, builder.mul(stride, i64(row * TILE_ROWS)))
                _void(builder, "tileloadd64", [_tile(4 + row), _at(builder, first, step * TILE_K), stride])
            for number, (tile, half) in enumerate(operands):
                register, product = _tile(6 + number % 2), "tdpbsud" if half else "tdpbssd"
                place = tile * APART + half * (UNPACKED // 2) + step * TILE_BYTES
                _void(builder, "tileloadd64", [register, _at(builder, b, place), i64(TILE_K)])
                for row in range(a_tiles):
                    _void(builder, product, [_tile(row * len(operands) + number), _tile(4 + row), register])
                    for token, column in lines[:chunks]:
                        _add_scaled(builder, sums, (token, column), is_joined, factors[column], x_scale, places[column])
                        for line in range(token, PREFETCHED, tokens):
                            prefetch(builder, builder.add(laters[column], i64(line * LINE)), near=False)
                    del lines[:chunks]
        assert not lines

    return _make(f"products.{a_tiles}.{b_tiles}.{is_joined}", 7, emit)


def _load_address(builder: Any, base: Any, offset: int) -> Any:
    return builder.load(_at(builder, base, offset), typ=I64, align=8)


def _add_scaled(
    builder: Any, sums: Any, at: tuple[int, int], is_joined: bool, d: Any, x_scale: Any, place: Any
) -> None:
    """place[token] += sums[token, column] * (d * the token's scale), 16 rows of weights; `at`: token and column.

    Joined sums are 256 * high + low, 32 of them a token. Others lie two columns side by side, and then the next two.
    """
    token, column = at
    pair, half = (column, 0) if is_joined else (column // 2, column % 2)
    line = pair * HALF_SUMS + token * PAIR_ROWS * 4 + half * LINE
    integer = builder.load(_at(builder, sums, line), typ=VI, align=LINE)
    if is_joined:
        low = builder.load(_at(builder, sums, line + LINE), typ=VI, align=LINE)
        integer = builder.add(builder.shl(integer, splat_bits(8)), low)
    scale = splat(builder, builder.load(_at(builder, x_scale, 4 * token), typ=F32, align=4), VF)
    target = _at(builder, place, token * ROW_BYTES)
    total = builder.load(target, typ=VF, align=LINE)
    later = multiply_add(builder, builder.sitofp(integer, VF), builder.fmul(d, scale), total)
    builder.store(later, target).align = LINE


def _emit_store(builder: Any, sums: Any) -> None:
    """Four products to two times int32 [16, 32]."""
    for number in range(4):
        place = number // 2 * HALF_SUMS + number % 2 * LINE
        _void(builder, "tilestored64", [_tile(number), _at(builder, sums, place), i64(PAIR_ROWS * 4)])


def _make_unpack(fmt: PackedFormat) -> Any:
    """(block, later, target): a block's integer * level as signed bytes [32, 16 rows, 4 columns] at `target`.

    Of `accurate` the upper bytes of 16-bit products, and the lower ones, unsigned, after them. `later`: address of a
    block of which those lines are prefetched that _make_products leaves out.
    """

    def emit(builder: Any, block: Any, later: Any, target: Any) -> None:
        for offset in range(PREFETCHED * LINE, fmt.block_bytes, LINE):
            prefetch(builder, builder.add(later, i64(offset)), near=False)
        quads = fmt.group // 4
        for group in range(BLOCK_K // fmt.group):
            write = _WRITERS[fmt.name](builder, fmt, block, group)
            for number in range(group * quads, (group + 1) * quads):
                for half, values in enumerate(write(number)):
                    place = _at(builder, target, half * UNPACKED // 2 + number * LINE)
                    builder.store(builder.bitcast(values, BYTES), place).align = LINE

    return _make(f"unpack.{fmt.name}", 3, emit)


def _emit_peak(builder: Any, operands: Any, rounds: Any) -> None:
    """Each round: four products of tiles, whose four operands come from the first-level cache."""
    entry, loop, end = builder.block, builder.append_basic_block("round"), builder.append_basic_block("end")
    for number in range(4):
        _void(builder, "tilezero", [_tile(number)])
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(I64)
    for number in range(4):
        _void(builder, "tileloadd64", [_tile(4 + number), _at(builder, operands, number * TILE_BYTES), i64(TILE_K)])
    for number in range(4):
        _void(builder, "tdpbssd", [_tile(number), _tile(4 + number // 2), _tile(6 + number % 2)])
    following = builder.add(at, i64(1))
    at.add_incoming(i64(0), entry)
    at.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, rounds), loop, end)
    builder.position_at_end(end)
    for number in range(4):
        place = _at(builder, operands, (4 + number) * TILE_BYTES)
        _void(builder, "tilestored64", [_tile(number), place, i64(TILE_K)])


PEAK_BYTES = 8 * TILE_BYTES  # four operands, and the four int32 [16, 16] that are stored in the end
PEAK_OPERATIONS = 2 * 4 * TILE_ROWS * TILE_ROWS * TILE_K  # of a round: a product and a sum each


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
        line = builder.load(_at(builder, block, fmt.header_bytes + LINE * (number // 2)), typ=BYTES, align=1)
        turned = builder.bitcast(builder.xor(line, turn), SHORTS)
        if number % 2:
            products = multiply_high(builder, builder.and_(turned, _shorts(0xF0F0)), high)
        else:
            products = builder.mul(builder.and_(turned, _shorts(0x0F0F)), low)
        return [builder.sub(builder.bitcast(products, BYTES), middle)]

    return write


def _write_accurate(builder: Any, fmt: PackedFormat, block: Any, group: int) -> Write:
    """The upper and the lower bytes of integer * level."""
    assert fmt.levels is not None
    s, eight, levels = _twice(builder, group_integers(builder, fmt, block, group)), _shorts(8), list(fmt.levels)
    low_bytes = _shorts(0xFF)

    def write(number: int) -> list[Any]:
        level = builder.bitcast(look_up(builder, code_quad(builder, fmt, block, number), levels), SHORTS)
        even = builder.mul(builder.ashr(builder.shl(level, eight), eight), s)
        odd = builder.mul(builder.ashr(level, eight), s)
        high = builder.or_(builder.lshr(even, eight), builder.and_(odd, _shorts(0xFF00)))
        low = builder.or_(builder.and_(even, low_bytes), builder.shl(odd, eight))
        return [high, low]

    return write


def _write_q8(builder: Any, fmt: PackedFormat, block: Any, group: int) -> Write:
    zero = ir.Constant(BYTES, [fmt.zero] * 64)
    return lambda number: [builder.xor(code_quad(builder, fmt, block, number), zero)]


_WRITERS = {"fast": _write_fast, "accurate": _write_accurate, "q8": _write_q8}


def _scales_of(builder: Any, header: Any) -> Any:
    word = builder.load(builder.inttoptr(header, POINTER), typ=VI, align=1)
    return builder.bitcast(builder.and_(word, splat_bits(SCALE_BITS)), VF)


# The Python signatures of intrinsics have one argument more than their callers give.
configure_tiles: Any = _configure_tiles
release_tiles: Any = _release_tiles
_wide, _long = (_make_products(*tiles, False) for tiles in ((1, 4), (2, 2)))
_wide_joined, _long_joined = (_make_products(*tiles, True) for tiles in ((1, 4), (2, 2)))
_store_products = _make("store", 1, _emit_store)
tile_rounds = _make("peak", 2, _emit_peak)  # ((operands, rounds)): for bandwidth.py
_unpack_fast, _unpack_accurate, _unpack_q8 = (_make_unpack(fmt) for fmt in (FAST, ACCURATE, Q8))


@inner
def _unpack(code, block, later, target):  # type: ignore[no-untyped-def]
    if code == FAST_CODE:
        _unpack_fast((block, later, target))
    elif code == ACCURATE_CODE:
        _unpack_accurate((block, later, target))
    else:
        _unpack_q8((block, later, target))


class Work(NamedTuple):
    """One call. used: address of the int64 numbers of the table's slots, those that hold a tile first.

    targets: address of what _set_targets writes. width: tiles of a step. tokens: of a product, 16 or 32.
    """

    inputs: Inputs
    table: int
    used: int
    targets: int
    blocks: int
    width: int
    tokens: int
    first: int
    out: int


@inner
def _find_used(table):  # type: ignore[no-untyped-def]
    """Write down, behind a table, which slots hold a tile, and then which do not; returns how many do."""
    slots = integers(table, (3 * SLOTS,))
    count, last = 0, SLOTS - 1
    for slot in range(SLOTS):
        if slots[slot] != 0:
            slots[2 * SLOTS + count] = slot
            count += 1
    for slot in range(SLOTS):
        if slots[slot] == 0:
            slots[2 * SLOTS + last] = slot
            last -= 1
    return count


@inner
def _later_block(work, slot, block):  # type: ignore[no-untyped-def]
    """Address of the block that is unpacked some blocks after `block`: of a slot's tile, or of what follows it."""
    slots, size, later = integers(work.table, (2 * SLOTS,)), block_bytes(work.inputs.code), block + AHEAD
    return slots[slot] + later * size if later < work.blocks else slots[SLOTS + slot] + (later - work.blocks) * size


@inner
def _unpack_step(work, block, step, target):  # type: ignore[no-untyped-def]
    slots, used = integers(work.table, (SLOTS,)), integers(work.used, (SLOTS,))
    for number in range(work.width):
        slot = used[step * work.width + number]
        if slots[slot] == 0:
            return
        address = slots[slot] + block * block_bytes(work.inputs.code)
        _unpack(work.inputs.code, address, _later_block(work, slot, block), target + number * APART)


@inner
def _set_targets(work, block, step):  # type: ignore[no-untyped-def]
    """For _make_products: addresses of a step's headers, offsets in a row of results, and blocks to prefetch.

    A slot without a tile takes another one's scales, and its results mean nothing.
    """
    targets, slots = integers(work.targets, (3 * SLOTS,)), integers(work.table, (SLOTS,))
    used = integers(work.used, (SLOTS,))
    for column in range(work.width):
        slot = used[step * work.width + column]
        source = slot if slots[slot] != 0 else used[0]
        targets[column] = slots[source] + block * block_bytes(work.inputs.code)
        targets[SLOTS + column] = slot * LINE
        targets[2 * SLOTS + column] = _later_block(work, source, block)


@inner
def _products(work, block, token, unpacked, sums, x_scale, out):  # type: ignore[no-untyped-def]
    """Tokens from `token` on times what a step has unpacked; meanwhile sums are added to `out` (_make_products)."""
    a = record_of(work.inputs, work.first + token) + block * BLOCK_K
    args = (a, record_bytes(work.inputs.k), unpacked, sums, x_scale, out, work.targets)
    if work.inputs.code == ACCURATE_CODE:
        if work.tokens == TOKENS:
            _long_joined(args)
        else:
            _wide_joined(args)
    elif work.tokens == TOKENS:
        _long(args)
    else:
        _wide(args)


@inner
def multiply_tiles(inputs, table, first, size, blocks, out, scratch):  # type: ignore[no-untyped-def]
    """out float32 [size, 128] = rows `first` on of `inputs` times the tiles of a table (packed_rows.py).

    Rows of inputs and of `out` up to the next multiple of 32 are read and written. scratch, out: at cache lines.

    A step unpacks a block of `width` tiles and multiplies it with all tokens, 16 (and twice as many tiles) or 32 at a
    time. Results are stored only after something else was done meanwhile: stores that wait hold up all loads from
    addresses that look alike.
    """
    tokens = TILE_ROWS if size <= TILE_ROWS else TOKENS
    width, used = 2 * TOKENS // tokens, table + 2 * SLOTS * 8
    if inputs.code == ACCURATE_CODE:
        width //= 2
    steps = (_find_used(table) + width - 1) // width
    work = Work(inputs, table, used, scratch + TARGETS, blocks, width, tokens, first, out)
    floats(out, ((size + tokens - 1) // tokens * tokens * ROW_BYTES // 4,))[:] = 0
    together = GROUP_STEPS if size > TOKENS else steps
    for start in range(0, steps, together):
        _multiply_steps(work, size, start, min(start + together, steps), scratch)


@inner
def _multiply_steps(work, size, first_step, end_step, scratch):  # type: ignore[no-untyped-def]
    """All blocks of some steps' tiles."""
    inputs, first, tokens, blocks = work.inputs, work.first, work.tokens, work.blocks
    unpacked, other, sums = scratch, scratch + STEP_BYTES, scratch + SUMS
    _unpack_step(work, 0, first_step, unpacked)
    _set_targets(work, 0, first_step)
    # nothing is waiting to be added yet: what these sums are is added to rows that nobody reads
    _products(work, 0, 0, unpacked, sums, scale_of(inputs, first), scratch + WASTE)
    block, step = 0, first_step
    while block < blocks:
        next_block, next_step = (block, step + 1) if step + 1 < end_step else (block + 1, first_step)
        if next_block < blocks:
            _unpack_step(work, next_block, next_step, other)
        _set_targets(work, block, step)
        for token in range(0, size, tokens):
            _store_products((sums,))
            x_scale = scale_of(inputs, first + token) + block * inputs.rows * 4
            target = work.out + token * ROW_BYTES
            if token + tokens < size:
                _products(work, block, token + tokens, unpacked, sums, x_scale, target)
            else:  # after the last step there is nothing more to multiply, but its sums are still to be added
                _products(work, min(next_block, blocks - 1), 0, other, sums, x_scale, target)
        block, step = next_block, next_step
        unpacked, other = other, unpacked


@shared
def uses_tiles(granted: int, tokens: int) -> bool:
    """Whether this many tokens of an expert, or of a linear, are multiplied with tiles where they are granted."""
    return granted != 0 and tokens >= TILE_TOKENS

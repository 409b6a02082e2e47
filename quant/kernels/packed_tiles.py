"""Packed rows times many tokens with AMX, whose instructions multiply tiles of bytes: 16 rows by 64 columns each.

A block of 16 rows by 128 columns is unpacked once to signed bytes integer * level, in the order of AMX's second
operand, and multiplied with all tokens, 16 at a time. `accurate` has products of up to 13 bits: they go in two bytes,
256 * high + low. The block's sums are those of packed_dot.py, exactly, and so is what follows: one product with
the scales, in order of k. So it does not matter which of the two ways a token takes.

A **step** is 16 tokens times a block of a pair of tiles, or of one tile of `accurate`, which is unpacked to two. Its
products go to two tile registers, one step later to memory, and another step later they are scaled and added to
float32 results. So nothing waits for what was begun just before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.isa import x86_has
from quant.kernels.activations import Inputs, k_blocks, offset_of, record_bytes, record_of, scale_of
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
    multiply_pairs,
    shuffle_bytes,
    unsigned_quad,
)
from quant.kernels.tiles import floats, integers
from quant.kernels.vector import (
    F32,
    I8,
    I32,
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
TOKENS = 16  # of a step
TILE_K = 64  # columns of a tile
TILE_BYTES = TILE_ROWS * TILE_K
UNPACKED = BLOCK_K // TILE_K * TILE_BYTES  # of a block
APART = UNPACKED + 5 * LINE  # bytes from one unpacked block to the next: half of 4 KiB would make them look alike
FEW_TOKENS = 32  # up to here a block of all 8 tiles is multiplied, then the next one
GROUP_TILES = 4  # beyond, of 4 tiles and then of the others, so that results stay in the first-level cache
AHEAD = 1  # blocks between an unpacked one and its prefetch
PREFETCHED = 18  # lines of a block that are prefetched between products: all of a 4-bit one
# Scratch: what two steps' tiles are unpacked to; how far the steps are; the last two steps' sums; where sums go.
STEP_BYTES = 2 * APART
ENTRIES, ENTRY_BYTES = 4, LINE  # of the last steps: a number that divides by 4
STATE = 2 * STEP_BYTES
STATE_BYTES = LINE + ENTRIES * ENTRY_BYTES
SUMS = STATE + STATE_BYTES
TARGETS = SUMS + 2 * 2 * TILE_BYTES
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


def _make_steps(is_joined: bool) -> Any:
    """(a, stride, b, x_scale, targets, state, groups): a step for each 16 tokens.

    a: address of the first token's 128 bytes of a block, the others' are `stride` apart. b: address of two unpacked
    tiles, APART bytes apart; `is_joined`: of signed high bytes and of unsigned low ones. targets: addresses of the
    blocks' headers, of where their sums are added for the first token, and of blocks to prefetch.
    """

    def emit(builder: Any, *args: Any) -> None:
        state, groups = args[5:]
        first = _load_address(builder, state, 0)
        end = builder.add(first, groups)
        entry, head, tail = builder.block, builder.append_basic_block("step"), builder.append_basic_block("next")
        builder.branch(head)
        builder.position_at_end(head)
        number = builder.phi(I64)
        group = builder.sub(number, first)
        is_first = builder.zext(builder.icmp_signed("==", group, i64(0)), I64)
        chosen = builder.switch(builder.or_(builder.and_(number, i64(1)), builder.shl(is_first, i64(1))), tail)
        for way in range(4):
            block = builder.append_basic_block(f"way{way}")
            chosen.add_case(i64(way), block)
            builder.position_at_end(block)
            _emit_step(builder, args, (group, number), _Step(way % 2, way // 2 == 1, is_joined))
            builder.branch(tail)
        builder.position_at_end(tail)
        following = builder.add(number, i64(1))
        number.add_incoming(first, entry)
        number.add_incoming(following, tail)
        done = builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed("<", following, end), head, done)
        builder.position_at_end(done)
        builder.store(end, builder.inttoptr(state, POINTER))

    return _make(f"steps.{is_joined}", 7, emit)


class _Step(NamedTuple):
    """What is known of a step when its code is written. prefetches: whether it is a block's first one."""

    parity: int
    prefetches: bool
    is_joined: bool

    @property
    def columns(self) -> int:
        return 1 if self.is_joined else 2


def _emit_step(builder: Any, args: tuple[Any, ...], at: tuple[Any, Any], step: _Step) -> None:
    """Multiply 16 tokens, and add up the sums of the step before the last one. at: group of tokens, step's number.

    Between products, sums of the step before are stored, and blocks that are unpacked later are prefetched, a line at
    a time: more at once than a core can wait for would hold it up. Steps take turns with registers 0, 1 and 2, 3,
    and with places for sums.
    """
    a, stride, b, x_scale, targets, state, _ = args
    _note_step(builder, at, x_scale, targets, state, step.columns)
    add = _Adding(builder, state, at[1], step)
    ask = _Asking(builder, targets, step)
    tokens = builder.add(a, builder.mul(stride, builder.mul(at[0], i64(TOKENS))))
    sums, last_sums = [2 * step.parity, 2 * step.parity + 1], [2 - 2 * step.parity, 3 - 2 * step.parity]
    last_place = builder.add(state, i64(STATE_BYTES + (1 - step.parity) * 2 * TILE_BYTES))
    for register in sums:
        _void(builder, "tilezero", [_tile(register)])
    for half in range(BLOCK_K // TILE_K):
        x = _tile(4 + half)
        _void(builder, "tileloadd64", [x, _at(builder, tokens, half * TILE_K), stride])
        for operand in range(2):
            weights, product = _tile(6 + operand), "tdpbsud" if step.is_joined and operand else "tdpbssd"
            place = operand * APART + half * TILE_BYTES
            _void(builder, "tileloadd64", [weights, _at(builder, b, place), i64(TILE_K)])
            _void(builder, product, [_tile(sums[operand]), x, weights])
            for eighth in (4 * half + 2 * operand, 4 * half + 2 * operand + 1):
                add.eighth(eighth)
                ask.eighth(eighth)
            if operand == 0:
                stored = _at(builder, last_place, half * TILE_BYTES)
                _void(builder, "tilestored64", [_tile(last_sums[half]), stored, i64(TILE_K)])


def _note_step(builder: Any, step: tuple[Any, Any], x_scale: Any, targets: Any, state: Any, columns: int) -> None:
    """Keep for two steps later where a step's scales are and where its sums go. step: its group and its number."""
    group, number = step
    entry = _entry(builder, state, number)
    scales = builder.add(x_scale, builder.mul(group, i64(TOKENS * 4)))
    _store_address(builder, entry, 0, scales)
    for column in range(columns):
        header = _load_address(builder, targets, 8 * column)
        place = _load_address(builder, targets, 8 * (SLOTS + column))
        _store_address(builder, entry, 8 + 16 * column, header)
        moved = builder.add(place, builder.mul(group, i64(TOKENS * ROW_BYTES)))
        _store_address(builder, entry, 16 + 16 * column, moved)


def _entry(builder: Any, state: Any, number: Any) -> Any:
    offset = builder.mul(builder.and_(number, i64(ENTRIES - 1)), i64(ENTRY_BYTES))
    return builder.add(builder.add(state, i64(LINE)), offset)


class _Asking:
    """Code that prefetches blocks, an eighth of their lines at a time."""

    def __init__(self, builder: Any, targets: Any, step: _Step):
        self.builder = builder
        columns = range(step.columns if step.prefetches else 0)
        laters = [_load_address(builder, targets, 8 * (2 * SLOTS + column)) for column in columns]
        self.lines = [(later, line) for line in range(PREFETCHED) for later in laters]

    def eighth(self, number: int) -> None:
        count = len(self.lines)
        for later, line in self.lines[count * number // 8 : count * (number + 1) // 8]:
            prefetch(self.builder, self.builder.add(later, i64(line * LINE)), near=False)


class _Adding:
    """Code that scales the sums of the step before the last one and adds them to results, an eighth at a time.

    Joined sums are 256 * high + low.
    """

    def __init__(self, builder: Any, state: Any, number: Any, step: _Step):
        self.builder, self.is_joined, columns = builder, step.is_joined, range(step.columns)
        entry = _entry(builder, state, builder.add(number, i64(ENTRIES - 2)))
        self.x_scale = _load_address(builder, entry, 0)
        self.factors = [_scales_of(builder, _load_address(builder, entry, 8 + 16 * column)) for column in columns]
        self.places = [_load_address(builder, entry, 16 + 16 * column) for column in columns]
        self.sums = builder.add(state, i64(STATE_BYTES + step.parity * 2 * TILE_BYTES))
        self.lines = [(column, token) for column in columns for token in range(TOKENS)]

    def eighth(self, number: int) -> None:
        count = len(self.lines) // 8
        for column, token in self.lines[number * count : (number + 1) * count]:
            self._add(column, token)

    def _add(self, column: int, token: int) -> None:
        """place[token] += sums[token] * (d * the token's scale), 16 rows of weights."""
        builder, line = self.builder, column * TILE_BYTES + token * LINE
        integer = builder.load(_at(builder, self.sums, line), typ=VI, align=LINE)
        if self.is_joined:
            low = builder.load(_at(builder, self.sums, TILE_BYTES + line), typ=VI, align=LINE)
            integer = builder.add(builder.shl(integer, splat_bits(8)), low)
        scale = splat(builder, builder.load(_at(builder, self.x_scale, 4 * token), typ=F32, align=4), VF)
        target = _at(builder, self.places[column], token * ROW_BYTES)
        total = builder.load(target, typ=VF, align=LINE)
        product = builder.fmul(self.factors[column], scale)
        later = multiply_add(builder, builder.sitofp(integer, VF), product, total)
        builder.store(later, target).align = LINE


def _load_address(builder: Any, base: Any, offset: int) -> Any:
    return builder.load(_at(builder, base, offset), typ=I64, align=8)


def _store_address(builder: Any, base: Any, offset: int, value: Any) -> None:
    builder.store(value, _at(builder, base, offset)).align = 8


def _make_unpack(fmt: PackedFormat) -> Any:
    """(block, later, target): a block's integer * level as signed bytes [32, 16 rows, 4 columns] at `target`.

    Of `accurate` the upper bytes of 16-bit products, and APART bytes later the lower ones, unsigned. `later`: address
    of a block of which those lines are prefetched that _make_steps leaves out.
    """

    def emit(builder: Any, block: Any, later: Any, target: Any) -> None:
        for offset in range(PREFETCHED * LINE, fmt.block_bytes, LINE):
            prefetch(builder, builder.add(later, i64(offset)), near=False)
        quads = fmt.group // 4
        for group in range(BLOCK_K // fmt.group):
            write = _WRITERS[fmt.name](builder, fmt, block, group)
            for number in range(group * quads, (group + 1) * quads):
                for half, values in enumerate(write(number)):
                    place = _at(builder, target, half * APART + number * LINE)
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


def _scales_of(builder: Any, header: Any) -> Any:
    word = builder.load(builder.inttoptr(header, POINTER), typ=VI, align=1)
    return builder.bitcast(builder.and_(word, splat_bits(SCALE_BITS)), VF)


# The Python signatures of intrinsics have one argument more than their callers give.
configure_tiles: Any = _configure_tiles
release_tiles: Any = _release_tiles
_steps, _joined_steps = (_make_steps(is_joined) for is_joined in (False, True))
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

    width: tiles of a step. groups: of 16 tokens, from row `first` of the inputs on.
    """

    inputs: Inputs
    table: int
    used: int
    width: int
    groups: int
    first: int
    out: int
    scratch: int


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
    slots, size, blocks = integers(work.table, (2 * SLOTS,)), block_bytes(work.inputs.code), k_blocks(work.inputs.k)
    later = block + AHEAD
    return slots[slot] + later * size if later < blocks else slots[SLOTS + slot] + (later - blocks) * size


@inner
def _unpack_tiles(work, block, place, target):  # type: ignore[no-untyped-def]
    """A block of a step's tiles, those whose slots are `used` from `place` on."""
    slots, used = integers(work.table, (SLOTS,)), integers(work.used, (SLOTS,))
    for number in range(work.width):
        slot = used[place + number]
        if slots[slot] == 0:
            return
        address = slots[slot] + block * block_bytes(work.inputs.code)
        _unpack(work.inputs.code, address, _later_block(work, slot, block), target + number * APART)


@inner
def _set_targets(work, block, place):  # type: ignore[no-untyped-def]
    """For _make_steps. A slot without a tile takes another one's scales, and its results mean nothing."""
    targets, slots = integers(work.scratch + TARGETS, (3 * SLOTS,)), integers(work.table, (SLOTS,))
    used = integers(work.used, (SLOTS,))
    for column in range(work.width):
        slot = used[place + column]
        source = slot if slots[slot] != 0 else used[0]
        targets[column] = slots[source] + block * block_bytes(work.inputs.code)
        targets[SLOTS + column] = work.out + slot * LINE
        targets[2 * SLOTS + column] = _later_block(work, source, block)


@inner
def _begin(work):  # type: ignore[no-untyped-def]
    """No step is done yet: what the first two find to add goes to results that nobody reads."""
    state = integers(work.scratch + STATE, (STATE_BYTES // 8,))
    slots, used = integers(work.table, (SLOTS,)), integers(work.used, (SLOTS,))
    state[0] = 0
    for number in range(1, 1 + ENTRIES):
        entry = number * ENTRY_BYTES // 8
        state[entry] = scale_of(work.inputs, work.first)
        for column in range(2):
            state[entry + 1 + 2 * column] = slots[used[0]]
            state[entry + 2 + 2 * column] = work.scratch + WASTE


@inner
def _run(work, block, unpacked, groups):  # type: ignore[no-untyped-def]
    """Steps of a block for `groups` groups of tokens."""
    inputs = work.inputs
    a = record_of(inputs, work.first) + block * BLOCK_K
    x_scale = scale_of(inputs, work.first) + block * inputs.rows * 4
    targets, state = work.scratch + TARGETS, work.scratch + STATE
    args = (a, record_bytes(inputs.k), unpacked, x_scale, targets, state, groups)
    if inputs.code == ACCURATE_CODE:
        _joined_steps(args)
    else:
        _steps(args)


@inner
def _multiply_slots(work, first, end):  # type: ignore[no-untyped-def]
    """All blocks of the tiles in slots `used` from `first` to `end`."""
    blocks, unpacked, other = k_blocks(work.inputs.k), work.scratch, work.scratch + STEP_BYTES
    _begin(work)
    _unpack_tiles(work, 0, first, unpacked)
    block, place = 0, first
    while block < blocks:
        next_block, next_place = (block, place + work.width) if place + work.width < end else (block + 1, first)
        if next_block < blocks:
            _unpack_tiles(work, next_block, next_place, other)
        _set_targets(work, block, place)
        _run(work, block, unpacked, work.groups)
        block, place = next_block, next_place
        unpacked, other = other, unpacked
    for _ in range(2):  # the last sums are still to be added: while something is multiplied that nobody reads
        _run(work, 0, unpacked, 1)


@inner
def multiply_tiles(inputs, table, first, size, out, scratch):  # type: ignore[no-untyped-def]
    """out float32 [size, 128] = rows `first` on of `inputs` times the tiles of a table (packed_rows.py).

    Rows of inputs and of `out` up to the next multiple of 16 are read and written. scratch, out: at cache lines.
    """
    groups, used = (size + TOKENS - 1) // TOKENS, table + 2 * SLOTS * 8
    width = 1 if inputs.code == ACCURATE_CODE else 2
    count = _find_used(table)
    work = Work(inputs, table, used, width, groups, first, out, scratch)
    floats(out, (groups * TOKENS * ROW_BYTES // 4,))[:] = 0
    together = SLOTS if size <= FEW_TOKENS else GROUP_TILES
    for start in range(0, count, together):
        _multiply_slots(work, start, min(start + together, count))


@shared
def uses_tiles(granted: int, tokens: int) -> bool:
    """Whether this many tokens of an expert, or of a linear, are multiplied with tiles where they are granted."""
    return granted != 0 and tokens >= TILE_TOKENS

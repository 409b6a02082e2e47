"""Tiles of 16 packed rows times 1 or 4 tokens, in LLVM IR. docs/formats.md has the blocks and the order of the sums.

Each lane is a row. Codes become unsigned bytes level + offset, four columns a lane, which are multiplied with four
activations and added up in int32: by `vpdpbusd` where there is VNNI, else as two sums of 16-bit products. The sums of
a block's groups, times the groups' integers, are added up in int32 too. All this is exact, so that it does not matter
how it is done; the offset is taken off by where a sum starts (activations.py). One float accumulator a row takes the
blocks in order of k, so a result does not depend on how many tokens are multiplied together.

Several tiles are worked on at the same time, a block of each in turn, because a processor reads several streams from
memory faster than one. Weights are prefetched a block ahead; at a tile's end that is the tile which the caller says
comes next, so that the streams never stop.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.isa import x86_has
from quant.kernels.activations import STARTS, offset_of
from quant.kernels.decode import ACCURATE_CODE, FAST_CODE
from quant.kernels.jit import inner
from quant.kernels.leaf import Leaf
from quant.kernels.vector import (
    F32,
    I8,
    I16,
    I32,
    I64,
    POINTER,
    TOKEN_TILE,
    VF,
    VI,
    i64,
    multiply_add,
    prefetch,
    splat,
    splat_bits,
    splat_float,
)
from quant.packed import ACCURATE, BLOCK_K, FAST, INTEGER_STEP, LINE, LOWEST_INTEGER, Q8, TILE_ROWS, PackedFormat

BLOCK_BYTES = {fmt.name: fmt.block_bytes for fmt in (FAST, ACCURATE, Q8)}
FAST_BYTES, ACCURATE_BYTES, Q8_BYTES = BLOCK_BYTES.values()

AHEAD = 1  # blocks between a read and its prefetch
# Tiles that are read at the same time, a block of each after the other. One stream from memory reaches 0.8 of what the
# processor can read, four 0.9, eight all of it (with 1 KiB of prefetch; two threads of a Xeon with AMX).
SLOTS = 8
ROW_BYTES = (SLOTS + 1) * LINE  # from one token's results to the next: no divisor of 4 KiB, or they would look alike
SCALE_BITS = 0xFFFF0000  # of a header's word
BYTES, SHORTS = ir.VectorType(I8, 64), ir.VectorType(I16, 32)
HALF_SHORTS, HALF_WORDS = ir.VectorType(I16, 16), ir.VectorType(I32, 8)


class _Inputs(NamedTuple):
    """Addresses of each token's record and of its first scale; bytes from one scale to the next; blocks of a row."""

    records: list[Any]
    scales: list[Any]
    scale_stride: Any
    blocks: Any


class _Block(NamedTuple):
    """One block of weights, and for each token the addresses of its q, of its starts and its scale.

    later: address of the block to prefetch, a line for each line that is read.
    """

    fmt: PackedFormat
    address: Any
    later: Any
    qs: list[Any]
    starts: list[Any]
    scales: list[Any]


def make_packed_dot(fmt: PackedFormat, tokens: int) -> Any:
    """Intrinsic: some tiles of 16 rows times `tokens` tokens, whole rows at once.

    dot(tiles, records, scales, scale_stride, blocks, out): addresses of a Tiles table (packed_rows.py) of tiles of
    `blocks` blocks, of each token's record and first scale (the next ones are `scale_stride` bytes apart), and of
    float32 [tokens, 128] results.
    """

    leaf = _dot_leaf(fmt, tokens)

    @intrinsic
    def dot(typingctx, tiles, records, scales, scale_stride, blocks, out):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            tiles, records, scales, *rest = args
            addresses = [builder.extract_value(value, t) for value in (records, scales) for t in range(tokens)]
            builder.call(leaf.declare(builder.module), [tiles, *addresses, *rest])
            return context.get_dummy_value()

        many = types.UniTuple(types.int64, tokens)
        return types.void(types.int64, many, many, *(types.int64,) * 3), codegen

    return dot


def _dot_leaf(fmt: PackedFormat, tokens: int) -> Leaf:
    def emit(builder: Any, tiles: Any, *args: Any) -> None:
        *addresses, scale_stride, blocks, out = args
        inputs = _Inputs(addresses[:tokens], addresses[tokens:], scale_stride, blocks)
        for row in range(tokens):
            for slot in range(SLOTS):
                _store_sums(builder, out, row, slot, splat_float(0.0))
        _loop(
            builder,
            blocks,
            lambda at: _loop(builder, i64(SLOTS), lambda slot: _tile(builder, fmt, tiles, slot, at, inputs, out)),
        )

    return Leaf(f"packed_dot.{fmt.name}.{tokens}", 2 * tokens + 4, emit)


def _loop(builder: Any, count: Any, body: Callable[[Any], None]) -> None:
    """body(0), body(1), ... below `count`, which is at least 1."""
    entry, loop, end = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(I64)
    body(at)
    following = builder.add(at, i64(1))
    at.add_incoming(i64(0), entry)
    at.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)


def _tile(builder: Any, fmt: PackedFormat, tiles: Any, slot: Any, at: Any, inputs: _Inputs, out: Any) -> None:
    """Add block `at` of the tile in a slot to its sums; nothing if there is none."""
    entry = builder.add(tiles, builder.mul(slot, i64(8)))
    tile = _load(builder, entry, 0, I64)
    with builder.if_then(builder.icmp_signed("!=", tile, i64(0))):
        later = builder.add(at, i64(AHEAD))
        is_here = builder.icmp_signed("<", later, inputs.blocks)
        start = builder.select(is_here, tile, _load(builder, entry, 8 * SLOTS, I64))
        number = builder.select(is_here, later, builder.sub(later, inputs.blocks))
        block = _Block(
            fmt,
            builder.add(tile, builder.mul(at, i64(fmt.block_bytes))),
            builder.add(start, builder.mul(number, i64(fmt.block_bytes))),
            [builder.add(record, builder.mul(at, i64(BLOCK_K))) for record in inputs.records],
            [_starts(builder, record, at, inputs.blocks) for record in inputs.records],
            [builder.add(scale, builder.mul(at, inputs.scale_stride)) for scale in inputs.scales],
        )
        column = builder.add(out, builder.mul(slot, i64(LINE)))
        sums = [_load(builder, column, row * ROW_BYTES, VF) for row in range(len(inputs.records))]
        for row, total in enumerate(_emit_block(builder, block, sums)):
            _store_sums(builder, column, row, 0, total)


def _starts(builder: Any, record: Any, at: Any, blocks: Any) -> Any:
    """Where the sums of a block's groups start, in a token's record."""
    number = builder.add(builder.mul(blocks, i64(BLOCK_K)), builder.mul(at, i64(4 * STARTS)))
    return builder.add(record, number)


def _store_sums(builder: Any, out: Any, row: int, slot: int, sums: Any) -> None:
    address = builder.add(out, i64(row * ROW_BYTES + slot * LINE))
    builder.store(sums, builder.inttoptr(address, POINTER)).align = 4


def _emit_block(builder: Any, block: _Block, sums: list[Any]) -> list[Any]:
    """Each token's 16 sums after one more block."""
    for offset in range(0, block.fmt.header_bytes, LINE):
        prefetch(builder, builder.add(block.later, i64(offset)))
    d = builder.bitcast(builder.and_(_load(builder, block.address, 0, VI), splat_bits(SCALE_BITS)), VF)
    after = []
    for scale, integers, total in zip(block.scales, _block_sums(builder, block), sums, strict=True):
        both = builder.fmul(d, splat(builder, _load(builder, scale, 0, F32), VF))
        after.append(multiply_add(builder, builder.sitofp(integers, VF), both, total))
    return after


def _block_sums(builder: Any, block: _Block) -> list[Any]:
    """For each token, the sums over the block's columns of integer times level times q: 16 int32 each."""
    totals = [splat_bits(0)] * len(block.qs)
    for group in range(BLOCK_K // block.fmt.group):
        if block.fmt.integers is None:
            return _group_sums(builder, block, group)
        factor = group_integers(builder, block.fmt, block.address, group)
        if _adds_in_16_bits(block.fmt):
            totals = _add_narrow_group(builder, block, group, factor, totals)
            continue
        groups = _group_sums(builder, block, group)
        totals = [
            _add_product(builder, block.fmt, total, part, factor) for total, part in zip(totals, groups, strict=True)
        ]
    return totals


def _quads_of_group(builder: Any, block: _Block, group: int) -> Iterator[int]:
    """Numbers of a group's four columns at a time; each line is prefetched where its like is about to be read."""
    each = block.fmt.group // 4
    for number in range(group * each, (group + 1) * each):
        if number * block.fmt.bits % 8 == 0:
            line = block.fmt.header_bytes + LINE * number * block.fmt.bits // 8
            prefetch(builder, builder.add(block.later, i64(line)))
        yield number


def _adds_in_16_bits(fmt: PackedFormat) -> bool:
    """Whether a group is best added up in 16 bits: codes of 4 bits, and a processor with AVX2 but without VNNI."""
    return fmt.integers == "odd4" and x86_has("avx2") and not x86_has("avxvnni") and not x86_has("avx512vnni")


def _add_narrow_group(builder: Any, block: _Block, group: int, factor: Any, totals: list[Any]) -> list[Any]:
    """Each token's totals after a group of `fast`: sums of code times q, at most 15 x 127 x 16, fit a lane's halves.

    factor: the group's integers, in the lower halves. Where the sum starts, at most 8 x 127 x 32, is multiplied apart.
    """
    both = builder.or_(factor, builder.shl(factor, splat_bits(16)))
    sums: list[Any] = [ir.Constant(SHORTS, [0] * 32)] * len(totals)
    for number in _quads_of_group(builder, block, group):
        weights = code_quad(builder, block.fmt, block.address, number)
        for token, q in enumerate(block.qs):
            four = builder.bitcast(splat(builder, _load(builder, q, 4 * number, I32), VI), BYTES)
            products = _call_in_parts(builder, "llvm.x86.avx2.pmadd.ub.sw", 2, [weights, four], HALF_SHORTS)
            sums[token] = builder.add(sums[token], products)
    after = []
    for total, narrow, at in zip(totals, sums, block.starts, strict=True):
        start = splat(builder, _load(builder, at, 4 * group, I32), VI)
        for words, integers in ((narrow, both), (start, factor)):
            operands = [builder.bitcast(words, SHORTS), builder.bitcast(integers, SHORTS)]
            total = builder.add(total, _call_in_parts(builder, "llvm.x86.avx2.pmadd.wd", 2, operands, HALF_WORDS))
        after.append(total)
    return after


def _group_sums(builder: Any, block: _Block, group: int) -> list[Any]:
    """For each token, the sums of level times q over a group: two chains of additions that need not wait."""
    chains = [[splat(builder, _load(builder, at, 4 * group, I32), VI), splat_bits(0)] for at in block.starts]
    for number in _quads_of_group(builder, block, group):
        weights = unsigned_quad(builder, block.fmt, block.address, number)
        for q, sums in zip(block.qs, chains, strict=True):
            four = splat(builder, _load(builder, q, 4 * number, I32), VI)
            sums[number % 2] = dot_bytes(builder, sums[number % 2], weights, four)
    return [builder.add(*sums) for sums in chains]


def group_integers(builder: Any, fmt: PackedFormat, address: Any, group: int) -> Any:
    """The integers of a group of 16 rows, as int32, but of `fast` in the lower halves only (the upper ones are 0)."""
    if fmt.integers == "odd4":
        word = _load(builder, address, 0, VI)
        moved = builder.shl(word, splat_bits(1)) if group == 0 else builder.lshr(word, splat_bits(4 * group - 1))
        doubled = builder.and_(moved, splat_bits(15 * INTEGER_STEP["odd4"]))
        lowest = ir.Constant(SHORTS, [-LOWEST_INTEGER["odd4"], 0] * TILE_ROWS)
        return builder.bitcast(builder.sub(builder.bitcast(doubled, SHORTS), lowest), VI)
    upper, lower = _load(builder, address, 0, VI), _load(builder, address, LINE, VI)
    shift = 2 * group - 4  # two bits to where bits 4 and 5 are
    moved = builder.lshr(upper, splat_bits(shift)) if shift > 0 else builder.shl(upper, splat_bits(-shift))
    low = builder.and_(builder.lshr(lower, splat_bits(4 * group)), splat_bits(15))
    stored = builder.or_(builder.and_(moved, splat_bits(48)), low)
    return builder.add(stored, splat_bits(LOWEST_INTEGER["i6"]))


def _add_product(builder: Any, fmt: PackedFormat, total: Any, part: Any, factor: Any) -> Any:
    """total + part * factor. A group's sum in `fast` fits 16 bits: at most 8 x 127 x 32."""
    if fmt.integers == "i6":
        return builder.add(total, builder.mul(part, factor))
    if x86_has("avx512vnni"):
        return _call_in_parts(builder, "llvm.x86.avx512.vpdpwssd.512", 1, [total, part, factor])
    if x86_has("avxvnni"):
        return _call_in_parts(builder, "llvm.x86.avx512.vpdpwssd.256", 2, [total, part, factor])
    return builder.add(total, _dot_shorts(builder, builder.bitcast(part, SHORTS), builder.bitcast(factor, SHORTS)))


def unsigned_quad(builder: Any, fmt: PackedFormat, address: Any, number: int) -> Any:
    """16 rows x 4 columns of unsigned bytes level + offset, from column 4 number of a block on."""
    codes = code_quad(builder, fmt, address, number)
    if fmt.levels is None:
        return codes
    return look_up(builder, codes, [level + offset_of(fmt) for level in fmt.levels])


def code_quad(builder: Any, fmt: PackedFormat, address: Any, number: int) -> Any:
    """The codes of 16 rows x 4 columns, from column 4 number of a block on."""
    if fmt.bits == 8:
        return _load(builder, address, fmt.header_bytes + LINE * number, BYTES)
    line = _load(builder, address, fmt.header_bytes + LINE * (number // 2), BYTES)
    if number % 2:
        line = builder.bitcast(builder.lshr(builder.bitcast(line, SHORTS), _constant(SHORTS, 4)), BYTES)
    return builder.and_(line, _constant(BYTES, 15))


def look_up(builder: Any, codes: Any, table: list[int]) -> Any:
    """table[code] for 64 codes below 16."""
    if x86_has("avx512bw"):
        return _call_in_parts(builder, "llvm.x86.avx512.pshuf.b.512", 1, [ir.Constant(BYTES, table * 4), codes])
    if x86_has("avx2"):
        return _call_in_parts(builder, "llvm.x86.avx2.pshuf.b", 2, [ir.Constant(BYTES, table * 4), codes])
    if x86_has("ssse3"):
        return _call_in_parts(builder, "llvm.x86.ssse3.pshuf.b.128", 4, [ir.Constant(BYTES, table * 4), codes])
    values = [_constant(BYTES, value) for value in table]
    for bit in range(4):
        is_set = builder.icmp_unsigned("!=", builder.and_(codes, _constant(BYTES, 1 << bit)), _constant(BYTES, 0))
        values = [builder.select(is_set, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def shuffle_bytes(builder: Any, values: Any, places: Any) -> Any:
    """For AVX-512: values[place] within each 16 bytes, for 64 places below 16."""
    return _call_in_parts(builder, "llvm.x86.avx512.pshuf.b.512", 1, [values, places])


def multiply_high(builder: Any, a: Any, b: Any) -> Any:
    """For AVX-512: the upper 16 bits of 32 products of unsigned 16-bit numbers."""
    return _call_in_parts(builder, "llvm.x86.avx512.pmulhu.w.512", 1, [a, b])


def multiply_pairs(builder: Any, a: Any, b: Any) -> Any:
    """For AVX-512: a's unsigned bytes times b's signed ones, and the sums of pairs, in 16 bits."""
    return _call_in_parts(builder, "llvm.x86.avx512.pmaddubs.w.512", 1, [a, b], SHORTS)


def dot_bytes(builder: Any, sums: Any, weights: Any, x: Any) -> Any:
    """sums [16] += the products of each lane's four unsigned bytes `weights` and four signed bytes `x`."""
    operands = [sums, builder.bitcast(weights, VI), x]
    if x86_has("avx512vnni"):
        return _call_in_parts(builder, "llvm.x86.avx512.vpdpbusd.512", 1, operands)
    if x86_has("avxvnni"):
        return _call_in_parts(builder, "llvm.x86.avx512.vpdpbusd.256", 2, operands)
    weights, x = builder.bitcast(weights, SHORTS), builder.bitcast(x, SHORTS)
    eight = _constant(SHORTS, 8)
    even = _dot_shorts(
        builder, builder.and_(weights, _constant(SHORTS, 255)), builder.ashr(builder.shl(x, eight), eight)
    )
    odd = _dot_shorts(builder, builder.lshr(weights, eight), builder.ashr(x, eight))
    return builder.add(sums, builder.add(even, odd))


def _dot_shorts(builder: Any, a: Any, b: Any) -> Any:
    """Sums of the two products in each of 16 lanes; LLVM makes `pmaddwd` of it where there is one."""
    wide = ir.VectorType(I32, 32)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    first, second = (
        builder.shuffle_vector(products, products, ir.Constant(VI, list(range(at, 32, 2)))) for at in (0, 1)
    )
    return builder.add(first, second)


def _call_in_parts(builder: Any, name: str, parts: int, vectors: list[Any], result: ir.Type | None = None) -> Any:
    """An intrinsic for narrower registers, called for each of `parts` pieces of the vectors.

    result: what it gives for a piece, if that is no vector of the first one's kind.
    """
    pieces = [[_piece(builder, vector, part, parts) for vector in vectors] for part in range(parts)]
    kind = ir.FunctionType(result or pieces[0][0].type, [piece.type for piece in pieces[0]])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    results = [builder.call(function, piece) for piece in pieces]
    while len(results) > 1:
        lanes = ir.Constant(ir.VectorType(I32, 2 * results[0].type.count), list(range(2 * results[0].type.count)))
        results = [builder.shuffle_vector(*pair, lanes) for pair in zip(results[::2], results[1::2], strict=True)]
    return results[0]


def _piece(builder: Any, vector: Any, part: int, parts: int) -> Any:
    if parts == 1:
        return vector
    count = vector.type.count // parts
    lanes = ir.Constant(ir.VectorType(I32, count), list(range(part * count, (part + 1) * count)))
    return builder.shuffle_vector(vector, vector, lanes)


def _constant(vector: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _load(builder: Any, base: Any, offset: int, kind: ir.Type) -> Any:
    loaded = builder.load(builder.inttoptr(builder.add(base, i64(offset)), POINTER), typ=kind)
    loaded.align = 1
    return loaded


_fast, _accurate, _q8 = (make_packed_dot(fmt, 1) for fmt in (FAST, ACCURATE, Q8))
_fast_many, _accurate_many, _q8_many = (make_packed_dot(fmt, TOKEN_TILE) for fmt in (FAST, ACCURATE, Q8))


@inner
def block_bytes(code):  # type: ignore[no-untyped-def]
    if code == FAST_CODE:
        return FAST_BYTES
    return ACCURATE_BYTES if code == ACCURATE_CODE else Q8_BYTES


@inner
def dot_tiles(code, tiles, tokens, records, scales, scale_stride, blocks, out):  # type: ignore[no-untyped-def]
    """float32 [tokens, 128] at `out` for up to 4 tokens times the tiles of a table (make_packed_dot).

    With 2 or 3 tokens there are 4 results, of which those beyond `tokens` mean nothing.
    """
    if tokens == 1:
        one, its_scale = (records[0],), (scales[0],)
        if code == FAST_CODE:
            _fast(tiles, one, its_scale, scale_stride, blocks, out)
        elif code == ACCURATE_CODE:
            _accurate(tiles, one, its_scale, scale_stride, blocks, out)
        else:
            _q8(tiles, one, its_scale, scale_stride, blocks, out)
    elif code == FAST_CODE:
        _fast_many(tiles, records, scales, scale_stride, blocks, out)
    elif code == ACCURATE_CODE:
        _accurate_many(tiles, records, scales, scale_stride, blocks, out)
    else:
        _q8_many(tiles, records, scales, scale_stride, blocks, out)

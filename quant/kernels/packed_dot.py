"""A tile of 16 packed rows times 1 or 4 tokens, in LLVM IR. docs/formats.md has the blocks and the order of the sums.

Each lane is a row. Codes become unsigned bytes level + offset, four columns a lane, which are multiplied with four
activations and added up in int32: by `vpdpbusd` where there is VNNI, else as two sums of 16-bit products. These
integers are exact, so both give the same bits; the offset is taken off by where a sum starts (activations.py).
One float accumulator a row takes the groups of 32 columns in order of k, so a result does not depend on how many
tokens are multiplied together.
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.isa import x86_has
from quant.kernels.activations import ACTIVATION_BLOCK, BLOCK_GROUPS, GROUP, SCALES, SUMS_16, SUMS_32
from quant.kernels.decode import ACCURATE_CODE, FAST_CODE, Q8_CODE
from quant.kernels.jit import inner
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
    splat,
    splat_bits,
    splat_float,
)
from quant.packed import ACCURATE, FAST, HEADER_BYTES, Q8, TILE_ROWS, PackedFormat

BLOCK_BYTES_4, BLOCK_BYTES_8 = FAST.block_bytes, Q8.block_bytes
RESULT_FLOATS = TOKEN_TILE * TILE_ROWS

LINE = 64  # bytes: 16 rows x 4 columns, or 8 of 4 bits
PREFETCH = 3072  # bytes ahead; 2 to 4 KiB gained 15 % on a Xeon
QUADS = GROUP // 4  # operands in a group: 16 rows x 4 columns each
LEVEL_OFFSET = 128  # makes signed levels unsigned
SCALE_OFFSET = 32  # what the 6-bit integers of `accurate` are stored with
BYTES, SHORTS = ir.VectorType(I8, 64), ir.VectorType(I16, 32)
ROW_BYTES, ROW_SHORTS = ir.VectorType(I8, TILE_ROWS), ir.VectorType(I16, TILE_ROWS)


def offset_of(fmt: PackedFormat) -> int:
    """What makes the levels of a format unsigned."""
    return fmt.zero if fmt.levels is None else LEVEL_OFFSET


OFFSET_FAST, OFFSET_OTHERS = offset_of(FAST), offset_of(Q8)
assert offset_of(ACCURATE) == OFFSET_OTHERS


class _Block(NamedTuple):
    """One block of weights and the addresses of the activation blocks it is multiplied with."""

    fmt: PackedFormat
    address: Any
    inputs: list[Any]


def make_packed_dot(fmt: PackedFormat, tokens: int) -> Any:
    """Intrinsic: 16 rows times `tokens` tokens, whole rows at once.

    dot(tile, inputs, blocks, result, stride): addresses of a tile of `blocks` blocks, of each token's activations and
    of the first token's 16 float32 results; the others' follow, `stride` bytes apart.
    """

    @intrinsic
    def dot(typingctx, tile, inputs, blocks, result, stride):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            tile, inputs_value, *rest = args
            addresses = [builder.extract_value(inputs_value, t) for t in range(tokens)]
            builder.call(_dot_function(builder.module, fmt, tokens), [tile, *addresses, *rest])
            return context.get_dummy_value()

        return types.void(types.int64, types.UniTuple(types.int64, tokens), *(types.int64,) * 3), codegen

    return dot


def _dot_function(module: Any, fmt: PackedFormat, tokens: int) -> Any:
    """The code as a function that is never inlined: it is long, and copies of it would take seconds to compile."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * (tokens + 4))
    function = cgutils.get_or_insert_function(module, kind, f"dsr1.packed_dot.{fmt.name}.{tokens}")
    if function.is_declaration:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        tile, *inputs, blocks, result, stride = function.args
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        sums = _emit_dot(builder, fmt, tile, inputs, blocks)
        for t, total in enumerate(sums):
            target = builder.add(result, builder.mul(stride, i64(t)))
            builder.store(total, builder.inttoptr(target, POINTER)).align = 4
        builder.ret_void()
    return function


def _emit_dot(builder: Any, fmt: PackedFormat, tile: Any, inputs: list[Any], blocks: Any) -> list[Any]:
    """Each token's 16 sums over all blocks."""
    entry = builder.block
    head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
    builder.branch(head)
    builder.position_at_end(head)
    at, sums = builder.phi(I64), [builder.phi(VF) for _ in inputs]
    builder.cbranch(builder.icmp_signed("<", at, blocks), body, end)

    builder.position_at_end(body)
    weights = builder.add(tile, builder.mul(at, i64(fmt.block_bytes)))
    x_offset = builder.mul(at, i64(ACTIVATION_BLOCK))
    xs = [builder.add(address, x_offset) for address in inputs]
    later_sums = _emit_block(builder, _Block(fmt, weights, xs), sums)
    starts, following = [i64(0), *[splat_float(0.0)] * len(sums)], [builder.add(at, i64(1)), *later_sums]
    for phi, first, later in zip([at, *sums], starts, following, strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(later, builder.block)
    builder.branch(head)

    builder.position_at_end(end)
    return sums


def _emit_block(builder: Any, block: _Block, sums: list[Any]) -> list[Any]:
    """Each token's 16 sums after one more block."""
    for offset in range(0, block.fmt.block_bytes, LINE):
        prefetch(builder, builder.add(block.address, i64(offset + PREFETCH)))
    for group in range(BLOCK_GROUPS):
        scale = _bf16_scale(builder, block, 0 if block.fmt is ACCURATE else group)
        factors = _integer_scales(builder, block, group) if block.fmt is ACCURATE else None
        products = _products(builder, block, group)
        after = []
        for x, halves, total in zip(block.inputs, products, sums, strict=True):
            both = builder.fmul(scale, splat(builder, _load(builder, x, SCALES + 4 * group, F32), VF))
            after.append(multiply_add(builder, _group_sum(builder, halves, factors), both, total))
        sums = after
    return sums


def _group_sum(builder: Any, halves: list[Any], factors: list[Any] | None) -> Any:
    """The group's integer as float32, exactly. With 6-bit scales it stays below 2**24, and so do its parts."""
    if factors is None:
        return builder.sitofp(builder.add(*halves), VF)
    first, second = (
        builder.fmul(builder.sitofp(half, VF), factor) for half, factor in zip(halves, factors, strict=True)
    )
    return builder.fadd(first, second)


def _products(builder: Any, block: _Block, group: int) -> list[list[Any]]:
    """For each token, sums of level times activation over the two halves of a group: 16 int32 each.

    Only `accurate` has a scale for each half; elsewhere halves are two chains of additions that need not wait.
    """
    halves = [_starts(builder, block, x, group) for x in block.inputs]
    for quad in range(QUADS):
        weights = _quad(builder, block, group, quad)
        for x, sums in zip(block.inputs, halves, strict=True):
            four = splat(builder, _load(builder, x, GROUP * group + 4 * quad, I32), VI)
            half = 2 * quad // QUADS
            sums[half] = dot_bytes(builder, sums[half], weights, four)
    return halves


def _starts(builder: Any, block: _Block, x: Any, group: int) -> list[Any]:
    """Where the sums of a group's halves start, so that offsets vanish."""
    if block.fmt is ACCURATE:
        return [splat(builder, _load(builder, x, SUMS_16 + 4 * (2 * group + half), I32), VI) for half in (0, 1)]
    return [splat(builder, _load(builder, x, SUMS_32 + 4 * group, I32), VI), splat_bits(0)]


def _bf16_scale(builder: Any, block: _Block, number: int) -> Any:
    """The 16 bfloat16 that stand `number`-th in the header, as float32."""
    bits = builder.zext(_load(builder, block.address, 2 * TILE_ROWS * number, ROW_SHORTS), VI)
    return builder.bitcast(builder.shl(bits, splat_bits(16)), VF)


def _integer_scales(builder: Any, block: _Block, group: int) -> list[Any]:
    """The 6-bit scales of a group's two halves, as float32."""
    low = _load(builder, block.address, 64 + TILE_ROWS * group, ROW_BYTES)
    high = _load(builder, block.address, 32 + TILE_ROWS * (group // 2), ROW_BYTES)
    scales = []
    for half in (0, 1):
        lower = builder.and_(builder.lshr(low, _constant(ROW_BYTES, 4 * half)), _constant(ROW_BYTES, 15))
        shift = 2 * (2 * group + half) % 8
        upper = builder.and_(builder.lshr(high, _constant(ROW_BYTES, shift)), _constant(ROW_BYTES, 3))
        stored = builder.or_(lower, builder.shl(upper, _constant(ROW_BYTES, 4)))
        integer = builder.sub(stored, _constant(ROW_BYTES, SCALE_OFFSET))
        scales.append(builder.sitofp(builder.sext(integer, VI), VF))
    return scales


def _quad(builder: Any, block: _Block, group: int, quad: int) -> Any:
    """16 rows x 4 columns of unsigned bytes level + offset, from column 32 group + 4 quad on."""
    number = QUADS * group + quad
    if block.fmt.bits == 8:
        return _load(builder, block.address, HEADER_BYTES + LINE * number, BYTES)
    line = _load(builder, block.address, HEADER_BYTES + LINE * (number // 2), BYTES)
    if number % 2:
        line = builder.bitcast(builder.lshr(builder.bitcast(line, SHORTS), _constant(SHORTS, 4)), BYTES)
    codes = builder.and_(line, _constant(BYTES, 15))
    if block.fmt.levels is None:
        return codes
    return _look_up(builder, codes, [level + LEVEL_OFFSET for level in block.fmt.levels])


def _look_up(builder: Any, codes: Any, table: list[int]) -> Any:
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


def _call_in_parts(builder: Any, name: str, parts: int, vectors: list[Any]) -> Any:
    """An intrinsic for narrower registers, called for each of `parts` pieces of the vectors."""
    pieces = [[_piece(builder, vector, part, parts) for vector in vectors] for part in range(parts)]
    kind = ir.FunctionType(pieces[0][0].type, [piece.type for piece in pieces[0]])
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


def prefetch(builder: Any, address: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    builder.call(prefetch, [builder.inttoptr(address, POINTER), read, keep, data])


_fast, _accurate, _q8 = (make_packed_dot(fmt, 1) for fmt in (FAST, ACCURATE, Q8))
_fast_many, _accurate_many, _q8_many = (make_packed_dot(fmt, TOKEN_TILE) for fmt in (FAST, ACCURATE, Q8))


@inner
def block_bytes(code):  # type: ignore[no-untyped-def]
    return BLOCK_BYTES_8 if code == Q8_CODE else BLOCK_BYTES_4


@inner
def offset_of_code(code):  # type: ignore[no-untyped-def]
    """What the sums of activations for weights of this format are multiplied with."""
    return OFFSET_FAST if code == FAST_CODE else OFFSET_OTHERS


@inner
def packed_tile(code, tile, tokens, inputs, blocks, result, stride):  # type: ignore[no-untyped-def]
    """float32 [16] for each of up to 4 `tokens` (activations at `inputs`), `stride` bytes apart from `result` on.

    With 2 or 3 tokens, there are 4 results, of which those beyond `tokens` mean nothing.
    """
    if tokens == 1:
        one = (inputs[0],)
        if code == FAST_CODE:
            _fast(tile, one, blocks, result, stride)
        elif code == ACCURATE_CODE:
            _accurate(tile, one, blocks, result, stride)
        else:
            _q8(tile, one, blocks, result, stride)
    elif code == FAST_CODE:
        _fast_many(tile, inputs, blocks, result, stride)
    elif code == ACCURATE_CODE:
        _accurate_many(tile, inputs, blocks, result, stride)
    else:
        _q8_many(tile, inputs, blocks, result, stride)

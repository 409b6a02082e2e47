"""Vector code in LLVM IR: decode weights and multiply them, 16 lanes at a time.

Every dot product has one order of summation: lane l of the accumulator takes k = l, l + 16, l + 32, ... with fused
multiply-adds, then halves are added (8 + 8, 4 + 4, 2 + 2, 1 + 1). So a result does not depend on how many rows or
tokens are multiplied together, on threads, or on whether weights were decoded before or on the way.
LLVM splits the 16 lanes into what the processor has (one AVX-512, two AVX2, four SSE or NEON registers). Processors
before Haswell have no fused multiply-add: there product and sum are each rounded.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.formats import FP8_BLOCK_SIDE
from quant.isa import processor_has

LANES = 16
ROW_TILE = 4  # weight rows multiplied together
TOKEN_TILE = 4  # tokens multiplied together: 16 accumulators and 8 operands fit 32 registers

# How weights are stored: 4 >> code bytes each.
F32_CODE, BF16_CODE, FP8_CODE = 0, 1, 2

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, POINTER = ir.FloatType(), ir.PointerType()
STORED = {F32_CODE: F32, BF16_CODE: I16, FP8_CODE: I8}
VI, VS, MASK = (ir.VectorType(bits, LANES) for bits in (I32, I16, I1))
VF, VH = ir.VectorType(F32, LANES), ir.VectorType(ir.HalfType(), LANES)

# An E4M3 byte, sign-extended and shifted left by 7, is a float16 of 2**-8 times the value, subnormal numbers included;
# going through float16 avoids float32 subnormals, which cost the processor a hundred cycles each.
FP8_SHIFT, FP8_SIGN_AND_VALUE, FP8_NAN = 7, 0xBF80, 0x3F80
FP8_FACTOR = 2.0**8
FP8_SMALLEST = 2.0**-9


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def splat_bits(value: int, vector: ir.VectorType = VI) -> ir.Constant:
    return ir.Constant(vector, [value] * LANES)


def splat_float(value: float) -> ir.Constant:
    return ir.Constant(VF, [value] * LANES)


def splat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), splat_bits(0))


def prefetch(builder: Any, address: Any, near: bool = True) -> None:
    """Ask for the line at an address: into the first-level cache, or only into the second (not `near`)."""
    kind = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(I32, value) for value in (0, 3 if near else 2, 1))
    builder.call(function, [builder.inttoptr(address, POINTER), read, keep, data])


def tail_mask(builder: Any, count: Any) -> Any:
    """True in the first `count` lanes."""
    lanes = ir.Constant(VI, list(range(LANES)))
    return builder.icmp_signed("<", lanes, splat(builder, builder.trunc(count, I32), VI))


def load_lanes(builder: Any, address: Any, element: ir.Type, mask: Any) -> Any:
    """16 elements at `address`, of any alignment; zero where `mask` is false (None: all are read)."""
    vector = ir.VectorType(element, LANES)
    pointer = builder.inttoptr(address, POINTER)
    if mask is None:
        loaded = builder.load(pointer, typ=vector)
        loaded.align = 1
        return loaded
    name = f"llvm.masked.load.v{LANES}{'f32' if element is F32 else element}.p0"
    kind = ir.FunctionType(vector, [POINTER, I32, MASK, vector])
    read = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(read, [pointer, ir.Constant(I32, 1), mask, ir.Constant(vector, None)])


def _load_scale(builder: Any, scale: Any, k: Any) -> Any:
    """FP8_FACTOR times the scale of column k's block, in all lanes. `scale`: address of this block row's scales."""
    block = builder.lshr(k, i64(FP8_BLOCK_SIDE.bit_length() - 1))
    address = builder.add(scale, builder.shl(block, i64(2)))
    value = builder.load(builder.inttoptr(address, POINTER), typ=F32)
    value.align = 1
    return splat(builder, builder.fmul(value, ir.Constant(F32, FP8_FACTOR)), VF)


def _decode(builder: Any, code: int, stored: Any, scale: Any) -> Any:
    """Stored lanes as float32, times their scale: rounded once, by that product."""
    if code == F32_CODE:
        return stored
    if code == BF16_CODE:
        return builder.bitcast(builder.shl(builder.zext(stored, VI), splat_bits(16)), VF)
    shifted = builder.shl(builder.sext(stored, VS), splat_bits(FP8_SHIFT, VS))
    half = builder.and_(shifted, splat_bits(FP8_SIGN_AND_VALUE, VS))
    value = builder.fpext(builder.bitcast(half, VH), VF) if processor_has("f16c") else _widen(builder, half)
    nan = splat_bits(FP8_NAN, VS)
    is_nan = builder.icmp_unsigned("==", builder.and_(shifted, nan), nan)
    return builder.fmul(builder.select(is_nan, splat_float(float("nan")), value), scale)


def _widen(builder: Any, half: Any) -> Any:
    """Float16 bits that hold an E4M3 value as float32, without the conversion instruction and without subnormals."""
    bits = builder.zext(half, VI)
    magnitude = builder.and_(bits, splat_bits(FP8_NAN))
    normal = builder.bitcast(builder.add(builder.shl(magnitude, splat_bits(13)), splat_bits((127 - 15) << 23)), VF)
    mantissa = builder.sitofp(builder.lshr(magnitude, splat_bits(FP8_SHIFT)), VF)
    subnormal = builder.fmul(mantissa, splat_float(FP8_SMALLEST / FP8_FACTOR))
    is_normal = builder.icmp_unsigned(">=", magnitude, splat_bits(8 << FP8_SHIFT))
    sign = builder.shl(builder.and_(bits, splat_bits(0x8000)), splat_bits(16))
    value = builder.bitcast(builder.select(is_normal, normal, subnormal), VI)
    return builder.bitcast(builder.or_(value, sign), VF)


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    if not processor_has("fma"):
        return builder.fadd(builder.fmul(a, b), c)
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(VF, [VF] * 3), f"llvm.fma.v{LANES}f32")
    return builder.call(fma, [a, b, c])


def _sum_lanes(builder: Any, sums: list[Any]) -> Any:
    """One vector with the sum of the 16 lanes of each of `sums` (a power of two of them, up to 16), in their order.

    Lanes are added in halves. Vectors are merged two by two on the way, so that all lanes stay busy.
    """
    width = LANES  # lanes that each sum still has
    while width > 1:
        width //= 2
        if len(sums) > 1:
            sums = [_add_halves(builder, pair[0], pair[1], width) for pair in zip(sums[::2], sums[1::2], strict=True)]
        else:
            sums = [_add_halves(builder, sums[0], sums[0], width, sums[0].type.count // 2)]
    return sums[0]


def _add_halves(builder: Any, first: Any, second: Any, half: int, count: int = LANES) -> Any:
    """Add each group's upper `half` lanes to its lower ones. Groups of `first`, then of `second`: `count` lanes."""
    starts = range(0, 2 * count, 2 * half)
    low, high = ([start + at + lane for start in starts for lane in range(half)] for at in (0, half))
    return builder.fadd(
        *(builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, count), lanes)) for lanes in (low, high))
    )


def _loop_over_k(builder: Any, k: Any, state: list[Any], step: Callable[[Any, list[Any], Any], list[Any]]) -> list[Any]:
    """Run step(k0, state, mask) for k0 = 0, 16, ... and once, masked, for what is left of `k`; the last state."""
    entry = builder.block
    loop, rest, tail, end = (builder.append_basic_block(name) for name in ("loop", "rest", "tail", "end"))
    whole = builder.and_(k, i64(-LANES))
    builder.cbranch(builder.icmp_signed(">", whole, i64(0)), loop, rest)

    builder.position_at_end(loop)
    at = builder.phi(I64)
    now = [builder.phi(value.type) for value in state]
    after = step(at, now, None)
    following = builder.add(at, i64(LANES))
    for phi, first, later in zip([at, *now], [i64(0), *state], [following, *after], strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(later, builder.block)
    loop_end = builder.block
    builder.cbranch(builder.icmp_signed("<", following, whole), loop, rest)

    builder.position_at_end(rest)
    kept = _join(builder, [(state, entry), (after, loop_end)])
    builder.cbranch(builder.icmp_signed("<", whole, k), tail, end)
    builder.position_at_end(tail)
    last = step(whole, kept, tail_mask(builder, builder.sub(k, whole)))
    tail_end = builder.block
    builder.branch(end)
    builder.position_at_end(end)
    return _join(builder, [(kept, rest), (last, tail_end)])


def _join(builder: Any, ways: list[tuple[list[Any], Any]]) -> list[Any]:
    """One phi for each value of the state."""
    phis = [builder.phi(value.type) for value in ways[0][0]]
    for values, block in ways:
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, block)
    return phis


def _offset(builder: Any, address: Any, k: Any, bytes_each: int) -> Any:
    return builder.add(address, builder.mul(k, i64(bytes_each)))


def make_dot(code: int, tokens: int) -> Any:
    """Intrinsic: result[t, r] = sum over k of weight row r times token t.

    dot(rows, inputs, scale, k, result): addresses of ROW_TILE weight rows of one block row, of `tokens` float32
    inputs, of the scales, and of float32 [tokens, ROW_TILE].
    """

    @intrinsic
    def dot(typingctx, rows, inputs, scale, k, result):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_dot(builder, code, tokens, args)
            return context.get_dummy_value()

        row_type, input_type = types.UniTuple(types.int64, ROW_TILE), types.UniTuple(types.int64, tokens)
        return types.void(row_type, input_type, types.int64, types.int64, types.int64), codegen

    return dot


def _emit_dot(builder: Any, code: int, tokens: int, args: Any) -> None:
    rows_arg, inputs_arg, scale, k, result = args
    rows = [builder.extract_value(rows_arg, r) for r in range(ROW_TILE)]
    inputs = [builder.extract_value(inputs_arg, t) for t in range(tokens)]

    def step(at: Any, sums: list[Any], mask: Any) -> list[Any]:
        block_scale = _load_scale(builder, scale, at) if code == FP8_CODE else None
        x = [load_lanes(builder, _offset(builder, address, at, 4), F32, mask) for address in inputs]
        after = []
        for r, address in enumerate(rows):
            stored = load_lanes(builder, _offset(builder, address, at, 4 >> code), STORED[code], mask)
            weight = _decode(builder, code, stored, block_scale)
            after += [multiply_add(builder, weight, x[t], sums[r * tokens + t]) for t in range(tokens)]
        return after

    sums = _loop_over_k(builder, k, [splat_float(0.0)] * (ROW_TILE * tokens), step)
    by_token = [sums[r * tokens + t] for t in range(tokens) for r in range(ROW_TILE)]
    builder.store(_sum_lanes(builder, by_token), builder.inttoptr(result, POINTER)).align = 4


def make_decode(code: int) -> Any:
    """Intrinsic decode(row, scale, k, out): float32 [k rounded up to 16] at `out` = the stored row times its scales."""

    @intrinsic
    def decode(typingctx, row, scale, k, out):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit_decode(builder, code, args)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 4), codegen

    return decode


def _emit_decode(builder: Any, code: int, args: Any) -> None:
    row, scale, k, out = args

    def step(at: Any, _: list[Any], mask: Any) -> list[Any]:
        block_scale = _load_scale(builder, scale, at) if code == FP8_CODE else None
        stored = load_lanes(builder, _offset(builder, row, at, 4 >> code), STORED[code], mask)
        target = builder.inttoptr(_offset(builder, out, at, 4), POINTER)
        builder.store(_decode(builder, code, stored, block_scale), target).align = 4
        return []

    _loop_over_k(builder, k, [], step)


@intrinsic
def _pointer(typingctx, address):  # type: ignore[no-untyped-def]
    """An address as the untyped pointer that numba.carray takes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@intrinsic
def _prefetch_line(typingctx, address):  # type: ignore[no-untyped-def]
    """Ask for the line at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _float_of_bits(typingctx, bits):  # type: ignore[no-untyped-def]
    """The float32 with these 32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], F32)

    return types.float32(types.int32), codegen


# The Python signatures of intrinsics have one argument more than their callers give.
pointer: Any = _pointer
prefetch_line: Any = _prefetch_line
float_of_bits: Any = _float_of_bits

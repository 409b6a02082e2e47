"""AMX's instructions, which multiply tiles of bytes (16 rows by 64 columns each), in LLVM IR."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.isa import x86_has
from quant.kernels.leaf import Leaf
from quant.kernels.vector import I8, I64, POINTER, i64
from quant.packed import LINE, TILE_ROWS

HAS_TILES = x86_has("amx-int8") and x86_has("avx512vnni")
TILE_K = LINE  # columns of a tile
TILE_BYTES = TILE_ROWS * TILE_K
PEAK_BYTES = 8 * TILE_BYTES  # four operands, and the four int32 [16, 16] that are stored in the end
PEAK_OPERATIONS = 2 * 4 * TILE_ROWS * TILE_ROWS * TILE_K  # of a round: a product and a sum each


def make_call(name: str, count: int, emit: Callable[..., None]) -> Any:
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


def at(builder: Any, base: Any, offset: int) -> Any:
    """Pointer to `offset` bytes after an address."""
    return builder.inttoptr(builder.add(base, i64(offset)), POINTER)


def load_tile(builder: Any, register: int, address: Any, stride: Any) -> None:
    """16 rows of 64 bytes that lie `stride` bytes apart."""
    _void(builder, "tileloadd64", [_tile(register), address, stride])


def store_tile(builder: Any, register: int, address: Any) -> None:
    """16 lines."""
    _void(builder, "tilestored64", [_tile(register), address, i64(LINE)])


def clear_tile(builder: Any, register: int) -> None:
    _void(builder, "tilezero", [_tile(register)])


def multiply_tile(builder: Any, sums: int, x: int, weights: int, is_signed: bool = True) -> None:
    """Add to int32 [16, 16] `sums` the product of signed x and of signed or unsigned weights."""
    _void(builder, "tdpbssd" if is_signed else "tdpbsud", [_tile(sums), _tile(x), _tile(weights)])


def _void(builder: Any, name: str, args: list[Any]) -> None:
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


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


def _emit_peak(builder: Any, operands: Any, rounds: Any) -> None:
    """Each round: four products of tiles, whose four operands come from the first-level cache."""
    entry, loop, end = builder.block, builder.append_basic_block("round"), builder.append_basic_block("end")
    for number in range(4):
        clear_tile(builder, number)
    builder.branch(loop)
    builder.position_at_end(loop)
    done = builder.phi(I64)
    for number in range(4):
        load_tile(builder, 4 + number, at(builder, operands, number * TILE_BYTES), i64(TILE_K))
    for number in range(4):
        multiply_tile(builder, number, 4 + number // 2, 6 + number % 2)
    following = builder.add(done, i64(1))
    done.add_incoming(i64(0), entry)
    done.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, rounds), loop, end)
    builder.position_at_end(end)
    for number in range(4):
        store_tile(builder, number, at(builder, operands, (4 + number) * TILE_BYTES))


# The Python signatures of intrinsics have one argument more than their callers give.
configure_tiles: Any = _configure_tiles
release_tiles: Any = _release_tiles
tile_rounds = make_call("peak", 2, _emit_peak)  # ((operands, rounds)): for bandwidth.py

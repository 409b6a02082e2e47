"""The two limits of this machine that a layer of experts is compared with: reading memory and multiplying bytes.

Reading adds up all 32-bit words, so that no load can be left out. Which way of reading is the fastest differs from
machine to machine, so there are several: one or four places at a time, with and without software prefetch.
Multiplying repeats the instruction of the packed kernels on operands from the first-level cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from quant.isa import x86_has
from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner
from quant.kernels.packed_dot import BYTES, LINE, dot_bytes
from quant.kernels.threads import call, thread_count
from quant.kernels.tile_instructions import HAS_TILES, PEAK_BYTES, configure_tiles, release_tiles, tile_rounds
from quant.kernels.tiles import integers, share
from quant.kernels.vector import I32, I64, LANES, VI, i64, load_lanes, prefetch, splat_bits

PAGE = 4096  # bytes; the unit of reading
STREAMS = 4  # places that are read at the same time, each in pages of its own
AHEAD = 4096  # bytes between a read and its prefetch
STEP_LINES = 4  # lines of 64 bytes of each stream in a round
SERIAL_PAGES = 64  # that one thread reads about as fast as others wake

SIDE = 4 if x86_has("avx512f") else 2  # SIDE x SIDE sums and the operands fit the registers
OPERAND_ROUNDS = 8  # rounds before operands come again, so that no product can be kept from the round before
OPERAND_BYTES = OPERAND_ROUNDS * 2 * SIDE * LINE
ROUND_OPERATIONS = 2 * SIDE * SIDE * 4 * LANES  # a product and a sum each


class ReadVariant(NamedTuple):
    """A way of reading. code: its number in the kernel. ahead: bytes that prefetches are ahead, 0 without them."""

    code: int
    streams: int
    ahead: int


READ_VARIANTS = tuple(
    ReadVariant(code, streams, ahead)
    for code, (streams, ahead) in enumerate(((1, 0), (1, AHEAD), (STREAMS, 0), (STREAMS, AHEAD)))
)


def _make_read(variant: ReadVariant) -> Any:
    """Intrinsic read(address, nbytes): the sum over `streams` neighbouring ranges of `nbytes` (whole pages) each."""

    @intrinsic
    def read(typingctx, address, nbytes):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _emit_read(builder, variant, *args)

        return types.int64(types.int64, types.int64), codegen

    return read


def _emit_read(builder: Any, variant: ReadVariant, address: Any, nbytes: Any) -> Any:
    starts = [builder.add(address, builder.mul(nbytes, i64(stream))) for stream in range(variant.streams)]

    def step(at: Any, sums: list[Any]) -> list[Any]:
        for start in starts:
            place = builder.add(start, at)
            lines = [builder.add(place, i64(LINE * line)) for line in range(STEP_LINES)]
            if variant.ahead:
                for line in lines:
                    prefetch(builder, builder.add(line, i64(variant.ahead)))
            words = [load_lanes(builder, line, I32, None) for line in lines]
            sums = [builder.add(*pair) for pair in zip(sums, words, strict=True)]
        return sums

    return _sum_of(builder, _loop(builder, nbytes, LINE * STEP_LINES, STEP_LINES, step))


def _loop(builder: Any, end: Any, stride: int, count: int, step: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """`count` vectors of int32 sums, from zeros, after step(at, sums) for at = 0, stride, ... below `end`."""
    entry = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    at, sums = builder.phi(I64), [builder.phi(VI) for _ in range(count)]
    builder.cbranch(builder.icmp_signed("<", at, end), body, after)

    builder.position_at_end(body)
    later = [builder.add(at, i64(stride)), *step(at, sums)]
    for phi, first, value in zip([at, *sums], [i64(0), *[splat_bits(0)] * count], later, strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return sums


def _sum_of(builder: Any, vectors: list[Any]) -> Any:
    """The sum of all lanes modulo 2**32, as int64."""
    total = vectors[0]
    for vector in vectors[1:]:
        total = builder.add(total, vector)
    kind = ir.FunctionType(I32, [VI])
    reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{LANES}i32")
    return builder.zext(builder.call(reduce, [total]), I64)


_one, _one_ahead, _four, _four_ahead = (_make_read(variant) for variant in READ_VARIANTS)


@inner
def _read_pages(address, pages, code):  # type: ignore[no-untyped-def]
    if code == 0:
        return _one(address, pages * PAGE)
    if code == 1:
        return _one_ahead(address, pages * PAGE)
    each = pages // STREAMS
    total = _one(address + each * STREAMS * PAGE, (pages - each * STREAMS) * PAGE)
    if code == 2:
        return total + _four(address, each * PAGE)
    return total + _four_ahead(address, each * PAGE)


@inner
def _read_part(ranges, count, code, part, parts):  # type: ignore[no-untyped-def]
    """One thread's pages of every range."""
    table = integers(ranges, (count, 2))
    total = 0
    for number in range(count):
        first, end = share(table[number, 1], part, parts)
        total += _read_pages(table[number, 0] + first * PAGE, end - first, code)
    return total


def _read(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """Arguments: the address of int64 [count, 2], the address and the number of pages of each range; count, code."""
    ranges, count, code = arguments_of(arguments, 3)
    return _read_part(ranges, count, code, part, parts)


@intrinsic
def _multiply_rounds(typingctx, operands, rounds):  # type: ignore[no-untyped-def]
    """`rounds` times SIDE x SIDE vectors of byte products. operands: address of OPERAND_BYTES."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit_rounds(builder, *args)

    return types.int64(types.int64, types.int64), codegen


# The Python signature of an intrinsic has one argument more than its callers give.
_multiply: Any = _multiply_rounds


def _emit_rounds(builder: Any, operands: Any, rounds: Any) -> Any:
    def step(at: Any, sums: list[Any]) -> list[Any]:
        place = builder.mul(builder.and_(at, i64(OPERAND_ROUNDS - 1)), i64(2 * SIDE * LINE))
        lines = [builder.add(builder.add(operands, place), i64(LINE * line)) for line in range(2 * SIDE)]
        loaded = [load_lanes(builder, line, I32, None) for line in lines]
        weights = [builder.bitcast(value, BYTES) for value in loaded[:SIDE]]
        pairs = [(weight, x) for weight in weights for x in loaded[SIDE:]]
        return [dot_bytes(builder, total, *pair) for total, pair in zip(sums, pairs, strict=True)]

    return _sum_of(builder, _loop(builder, rounds, 1, SIDE * SIDE, step))


def _multiply_parts(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """The same rounds in each part. Arguments: those of _multiply."""
    operands, rounds = arguments_of(arguments, 2)
    return _multiply(operands, rounds)


@inner
def _multiply_tile_rounds(operands, rounds):  # type: ignore[no-untyped-def]
    configure_tiles()
    tile_rounds((operands, rounds))
    release_tiles()


@inner
def _no_tiles(operands, rounds):  # type: ignore[no-untyped-def]
    pass


_multiply_tiles = _multiply_tile_rounds if HAS_TILES else _no_tiles


def _multiply_tiles_parts(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """Rounds of AMX products in each part, on operands of its own. Arguments: address, rounds."""
    operands, rounds = arguments_of(arguments, 2)
    _multiply_tiles(operands + part * PEAK_BYTES, rounds)
    return 0


read_kernel = Kernel(_read)
multiply_tiles_kernel = Kernel(_multiply_tiles_parts)
multiply_kernel = Kernel(_multiply_parts)


def read_ranges(ranges: Tensor, variant: ReadVariant) -> int:
    """Read memory once with all threads, or with one if it is little; the sum of its 32-bit words modulo 2**32.

    ranges: int64 [R, 2], contiguous: the address of each range and its pages of 4 KiB.
    """
    parts = 1 if int(ranges[:, 1].sum()) < SERIAL_PAGES else thread_count()
    total = call(read_kernel, (ranges.data_ptr(), len(ranges), variant.code), parts)
    return int(total) & 0xFFFFFFFF


def multiply_tiles(operands: Tensor, rounds: int) -> None:
    """Multiply tiles of bytes with AMX in all threads, `rounds` times PEAK_OPERATIONS each.

    operands: uint8 [threads, PEAK_BYTES]; the second half of a row becomes its int32 [4, 16, 16] sums.
    """
    call(multiply_tiles_kernel, (operands.data_ptr(), rounds), thread_count())


def multiply_bytes(operands: Tensor, rounds: int) -> int:
    """Multiply unsigned with signed bytes in all threads, `rounds` times each; the sum of all products modulo 2**32.

    operands: uint8 [OPERAND_BYTES]. There are ROUND_OPERATIONS additions and multiplications in a round.
    """
    return int(call(multiply_kernel, (operands.data_ptr(), rounds), thread_count())) & 0xFFFFFFFF

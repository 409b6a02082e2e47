"""A chunk of weights times many tokens: a **step** for each 16 of them, whose sums are scaled and added to results.

A step's products go to two tile registers. One step later these are stored, and another step later, when the
products of then are on their way, they are scaled and added, so that nothing waits for what was begun just before. The
tile unit takes one of the two vector ports from multiplications of floats, but not from the instructions that unpack:
so the next chunk is unpacked between the products of the first steps, whose own sums come later.

Prefetches are spread over the steps: each holds one of the few places for lines that are on their way to the
first-level cache, and what finds none free waits. A chunk has a block of each of two tiles, not two of one, because 17
lines are about as many as the processor itself fetches ahead of a stream.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from quant.kernels.packed_dot import ROW_BYTES, SCALE_BITS
from quant.kernels.tile_instructions import (
    TILE_BYTES,
    TILE_K,
    at,
    clear_tile,
    load_tile,
    make_call,
    multiply_tile,
    store_tile,
)
from quant.kernels.tile_unpack import CHUNK_TILES, PORTIONS, emit_portion
from quant.kernels.vector import F32, I64, POINTER, VF, VI, i64, multiply_add, prefetch, splat, splat_bits
from quant.packed import ACCURATE, FAST, LINE, Q8, PackedFormat

TOKENS = 16  # of a step
PRODUCTS = 4
QUARTER = TOKENS // PRODUCTS  # tokens whose sums are added beside a product
ASKED = {FAST.name: 5, ACCURATE.name: 5, Q8.name: 9}  # lines of each block that are prefetched in a step
SUMS_BYTES = 2 * 2 * TILE_BYTES  # of two steps, two tiles each
WEIGHTS = 4  # the first of the tile registers that hold weights; 0 and 1 hold sums, 2 and 3 tokens

Emit = Callable[[], None]


class Chunk(NamedTuple):
    """What a call multiplies, and what it unpacks for a later one. Where a chunk is one block, `other` is anything.

    x: address of the first token's 128 bytes of the block; the other tokens' are `stride` bytes apart.
    unpacked: of the chunk's four operands. groups: of 16 tokens. sums: address of SUMS_BYTES of scratch.
    following, other_following: addresses of the blocks of the chunk to unpack; target: of where to.
    later, other_later: of the blocks of a chunk to prefetch.
    """

    x: Any
    stride: Any
    unpacked: Any
    groups: Any
    sums: Any
    following: Any
    other_following: Any
    target: Any
    later: Any
    other_later: Any


class Results(NamedTuple):
    """Where a chunk's sums go.

    scales: address of the first token's scale in the block; the others follow.
    header, other_header: of the packed blocks.
    place, other_place: of float32 [16] to which the first token's sums are added; the others' are ROW_BYTES apart.
    """

    scales: Any
    header: Any
    place: Any
    other_header: Any
    other_place: Any


def make_steps(fmt: PackedFormat) -> Any:
    """Intrinsic of the fields of Chunk, of its Results, and of those of the chunk before, as int64.

    All steps of a chunk. What the last one has summed is added by the next call, or by what make_last makes.
    """
    count = len(Chunk._fields) + 2 * len(Results._fields)
    return make_call(f"steps.{fmt.name}", count, lambda builder, *args: _Steps(builder, fmt, *args).emit())


def make_last(fmt: PackedFormat) -> Any:
    """Intrinsic of (sums, groups, the fields of Results): adds what the last step of the last chunk has summed."""

    def emit(builder: Any, sums: Any, groups: Any, *results: Any) -> None:
        for add in _Adding(builder, fmt, sums, Results(*results)).emits(builder.sub(groups, i64(1))):
            add()

    return make_call(f"last.{fmt.name}", 2 + len(Results._fields), emit)


class _Adding:
    """Code that scales sums and adds them to results."""

    def __init__(self, builder: Any, fmt: PackedFormat, sums: Any, results: Results):
        self.builder, self.sums, self.results = builder, sums, results
        self.is_joined = CHUNK_TILES[fmt.name] == 1  # sums are 256 * high + low
        headers = (results.header, results.other_header)[: CHUNK_TILES[fmt.name]]
        self.factors = [_scales_of(builder, header) for header in headers]

    def emits(self, group: Any) -> list[Emit]:
        """For each four tokens of a step: place += sums * (d * the token's scale), 16 rows, in order of blocks."""
        builder, results, tokens = self.builder, self.results, _tokens(self.builder, group)
        scales = builder.add(results.scales, builder.mul(tokens, i64(4)))
        offset = builder.mul(tokens, i64(ROW_BYTES))
        places = [builder.add(first, offset) for first in (results.place, results.other_place)]
        add = partial(self._add_tokens, _sums_of(builder, self.sums, group), scales, places)
        return [partial(add, first) for first in range(0, TOKENS, QUARTER)]

    def _add_tokens(self, sums: Any, scales: Any, places: list[Any], first: int) -> None:
        builder = self.builder
        for token in range(first, first + QUARTER):
            scale = builder.load(at(builder, scales, 4 * token), typ=F32, align=4)
            for block, factor in enumerate(self.factors):
                target = at(builder, places[block], token * ROW_BYTES)
                product = builder.fmul(factor, splat(builder, scale, VF))
                integers = builder.sitofp(self._integers(sums, block, token), VF)
                total = multiply_add(builder, integers, product, builder.load(target, typ=VF, align=LINE))
                builder.store(total, target).align = LINE

    def _integers(self, sums: Any, block: int, token: int) -> Any:
        builder = self.builder
        integers = builder.load(at(builder, sums, block * TILE_BYTES + token * LINE), typ=VI, align=LINE)
        if not self.is_joined:
            return integers
        low = builder.load(at(builder, sums, TILE_BYTES + token * LINE), typ=VI, align=LINE)
        return builder.add(builder.shl(integers, splat_bits(8)), low)


class _Steps:
    """Code for the steps of a chunk."""

    def __init__(self, builder: Any, fmt: PackedFormat, *args: Any):
        size, more = len(Chunk._fields), len(Results._fields)
        self.builder, self.fmt, self.chunk = builder, fmt, Chunk(*args[:size])
        self.is_joined = CHUNK_TILES[fmt.name] == 1
        self.lines, self.asked = fmt.block_bytes // LINE, ASKED[fmt.name]
        self.now = _Adding(builder, fmt, self.chunk.sums, Results(*args[size : size + more]))
        self.before = _Adding(builder, fmt, self.chunk.sums, Results(*args[size + more :]))

    def emit(self) -> None:
        builder, groups = self.builder, self.chunk.groups
        for number in range(PRODUCTS):
            operand = at(builder, self.chunk.unpacked, number * TILE_BYTES)
            load_tile(builder, WEIGHTS + number, operand, i64(TILE_K))
        only, several, end = (builder.append_basic_block(name) for name in ("only", "several", "end"))
        builder.cbranch(builder.icmp_signed("==", groups, i64(1)), only, several)
        for block, steps in ((only, self._only_step), (several, self._several_steps)):
            builder.position_at_end(block)
            steps()
            for register in range(2):
                self._store(register, builder.sub(groups, i64(1)))
            builder.branch(end)
        builder.position_at_end(end)

    def _only_step(self) -> None:
        self._multiply(i64(0), self._adding_before(), self._unpacking(0, PORTIONS), self._asking(i64(0), self.lines))

    def _several_steps(self) -> None:
        """The loop's body may run not once."""
        builder, groups, half = self.builder, self.chunk.groups, PORTIONS // 2
        self._multiply(i64(0), self._adding_before(), self._unpacking(0, half), self._asking_in(i64(0)))
        self._multiply(i64(1), self._unpacking(half, PORTIONS), self._asking_in(i64(1)), stores=True)
        entry, head, body, end = builder.block, *(builder.append_basic_block(name) for name in ("head", "body", "end"))
        builder.branch(head)
        builder.position_at_end(head)
        group = builder.phi(I64)
        group.add_incoming(i64(2), entry)
        builder.cbranch(builder.icmp_signed("<", group, groups), body, end)
        builder.position_at_end(body)
        adding = self.now.emits(builder.sub(group, i64(2)))
        self._multiply(group, adding, self._asking_in(group), stores=True)
        group.add_incoming(builder.add(group, i64(1)), builder.block)
        builder.branch(head)
        builder.position_at_end(end)
        left = self._asking(builder.mul(groups, i64(self.asked)), max(0, self.lines - 2 * self.asked))
        for emit in _mix(self.now.emits(builder.sub(groups, i64(2))), left):
            emit()

    def _multiply(self, group: Any, *beside: list[Emit], stores: bool = False) -> None:
        """The products of 16 tokens; between them what else there is to do. stores: the sums of the step before."""
        mixed = _mix(*beside)
        for product in range(PRODUCTS):
            sums, half = product % 2, product // 2
            weights, is_low = WEIGHTS + 2 * sums + half, self.is_joined and sums == 1
            if sums == 0:
                self._load_tokens(2 + half, group, half)
            if stores and half == 0:
                self._store(sums, self.builder.sub(group, i64(1)))
            if half == 0:
                clear_tile(self.builder, sums)
            multiply_tile(self.builder, sums, 2 + half, weights, is_signed=not is_low)
            for emit in mixed[len(mixed) * product // PRODUCTS : len(mixed) * (product + 1) // PRODUCTS]:
                emit()

    def _load_tokens(self, register: int, group: Any, half: int) -> None:
        builder, stride = self.builder, self.chunk.stride
        first = builder.add(self.chunk.x, builder.mul(stride, _tokens(builder, group)))
        load_tile(builder, register, at(builder, first, half * TILE_K), stride)

    def _store(self, register: int, group: Any) -> None:
        sums = _sums_of(self.builder, self.chunk.sums, group)
        store_tile(self.builder, register, at(self.builder, sums, register * TILE_BYTES))

    def _unpacking(self, first: int, end: int) -> list[Emit]:
        chunk, blocks = self.chunk, [self.chunk.following, self.chunk.other_following]
        return [
            partial(emit_portion, self.builder, self.fmt, number, blocks, chunk.target) for number in range(first, end)
        ]

    def _adding_before(self) -> list[Emit]:
        return self.before.emits(self.builder.sub(self.chunk.groups, i64(1)))

    def _asking_in(self, group: Any) -> list[Emit]:
        return self._asking(self.builder.mul(group, i64(self.asked)), self.asked)

    def _asking(self, first: Any, count: int) -> list[Emit]:
        return [partial(self._ask, first, number) for number in range(count)]

    def _ask(self, first: Any, number: int) -> None:
        """Prefetch the line `number` lines after the line `first` of each later block; at most its last one."""
        builder, chunk = self.builder, self.chunk
        line = builder.add(first, i64(number))
        line = builder.select(builder.icmp_signed("<", line, i64(self.lines)), line, i64(self.lines - 1))
        offset = builder.mul(line, i64(LINE))
        for later in (chunk.later, chunk.other_later)[: CHUNK_TILES[self.fmt.name]]:
            prefetch(builder, builder.add(later, offset), near=False)


def _mix(*lists: list[Emit]) -> list[Emit]:
    """All of them, each in its order, evenly spread over the whole."""
    placed = [((number + 0.5) / len(emits), emit) for emits in lists for number, emit in enumerate(emits)]
    return [emit for _, emit in sorted(placed, key=lambda pair: pair[0])]


def _sums_of(builder: Any, sums: Any, group: Any) -> Any:
    """Address of a step's sums: steps take turns."""
    return builder.add(sums, builder.mul(builder.and_(group, i64(1)), i64(2 * TILE_BYTES)))


def _tokens(builder: Any, group: Any) -> Any:
    """Tokens before a group."""
    return builder.mul(group, i64(TOKENS))


def _scales_of(builder: Any, header: Any) -> Any:
    word = builder.load(builder.inttoptr(header, POINTER), typ=VI, align=1)
    return builder.bitcast(builder.and_(word, splat_bits(SCALE_BITS)), VF)

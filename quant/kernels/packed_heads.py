"""wkv_b as a store holds it, absorbed into queries and outputs: products of packed rows with float32 activations.

The lanes of a vector are the 16 rows of a tile; a line of a block holds four or eight columns of them, as codes. In a
group of columns a row's weights are scale * (code - zero) (docs/formats.md):

    absorb   out[k] = sum over rows n of q[n] w[n, k]: q is multiplied with the scales first, lanes are summed last
    expand   out[n] = sum over k of w[n, k] x[k]: each group's sum is multiplied with its scales
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import types
from numba.extending import intrinsic

from quant.kernels.jit import inner
from quant.kernels.online_softmax import counted_loop
from quant.kernels.vector import (
    F32,
    I32,
    LANES,
    POINTER,
    VF,
    VI,
    _sum_lanes,
    i64,
    load_lanes,
    multiply_add,
    splat,
    splat_bits,
    splat_float,
)
from quant.packed import BLOCK_K, FAST, LINE, Q8, TILE_ROWS, PackedFormat

HEADS_CODES = {Q8.block_bytes: 3, FAST.block_bytes: 4}  # codes of wkv_b in packed form, beside F32_CODE and BF16_CODE
Q8_HEADS, FAST_HEADS = HEADS_CODES[Q8.block_bytes], HEADS_CODES[FAST.block_bytes]
SUMS = BLOCK_K * LANES  # float32 values of scratch
HIGH_HALF = 0xFFFF0000 - (1 << 32)


@dataclass(frozen=True)
class _Layout:
    """A format without levels, whose header is one line."""

    fmt: PackedFormat

    @property
    def columns(self) -> int:
        """Columns of a line."""
        return LINE * 8 // self.fmt.bits // TILE_ROWS

    @property
    def lines(self) -> int:
        """Lines of a group."""
        return self.fmt.group // self.columns

    @property
    def groups(self) -> int:
        return BLOCK_K // self.fmt.group

    def scales(self, builder: Any, block: Any, group: Any) -> Any:
        """What the codes of a group are multiplied by, in each of the 16 rows."""
        header = load_lanes(builder, block, I32, None)
        d = builder.bitcast(builder.and_(header, splat_bits(HIGH_HALF)), VF)
        if self.fmt.integers is None:
            return d
        shift = splat(builder, builder.trunc(builder.mul(group, i64(4)), I32), VI)
        integer = builder.and_(builder.lshr(header, shift), splat_bits(15))
        odd = builder.sub(builder.add(integer, integer), splat_bits(15))
        return builder.fmul(d, builder.sitofp(odd, VF))

    def codes(self, builder: Any, line: Any) -> list[Any]:
        """The codes less `zero` of a line's columns, as float32. line: its address."""
        words, columns = load_lanes(builder, line, I32, None), []
        for column in range(self.columns):
            half, byte = divmod(column, 4)
            code = builder.and_(
                builder.lshr(words, splat_bits(8 * byte + 4 * half)), splat_bits((1 << self.fmt.bits) - 1)
            )
            columns.append(builder.sitofp(builder.sub(code, splat_bits(self.fmt.zero)), VF))
        return columns


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, POINTER)).align = 4


def _address(builder: Any, base: Any, index: Any, stride: int) -> Any:
    return builder.add(base, builder.mul(index, i64(stride)))


def _make(emit: Callable[[Any, Any, _Layout], None], fmt: PackedFormat, arguments: int) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(builder, args, _Layout(fmt))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * arguments), codegen


def _make_absorb(fmt: PackedFormat) -> Any:
    @intrinsic
    def absorb(typingctx, data, tiles, blocks, q, sums, out):  # type: ignore[no-untyped-def]
        return _make(_emit_absorb, fmt, 6)

    return absorb


def _emit_absorb(builder: Any, args: Any, layout: _Layout) -> None:
    data, tiles, blocks, q, sums, out = args
    tile_bytes = builder.mul(blocks, i64(layout.fmt.block_bytes))

    def add_block(block: Any, _: list[Any]) -> list[Any]:
        corner = _address(builder, data, block, layout.fmt.block_bytes)
        _add_rows(builder, layout, corner, q, sums, first=True)

        def add_tile(tile: Any, _: list[Any]) -> list[Any]:
            rows = _address(builder, q, tile, 4 * TILE_ROWS)
            _add_rows(builder, layout, builder.add(corner, builder.mul(tile, tile_bytes)), rows, sums, first=False)
            return []

        counted_loop(builder, i64(1), tiles, 1, [], add_tile)
        _fold(builder, sums, _address(builder, out, block, BLOCK_K * 4))
        return []

    counted_loop(builder, i64(0), blocks, 1, [], add_block)


def _add_rows(builder: Any, layout: _Layout, block: Any, q: Any, sums: Any, first: bool) -> None:
    """sums [128, 16] (+)= q [16] times the weights of a block's 16 rows, each row in its lane."""
    rows = load_lanes(builder, q, F32, None)

    def add_group(group: Any, _: list[Any]) -> list[Any]:
        scaled = builder.fmul(rows, layout.scales(builder, block, group))

        def add_line(number: Any, _: list[Any]) -> list[Any]:
            line = builder.add(_address(builder, i64(0), group, layout.lines), number)
            place = _address(builder, sums, line, layout.columns * LANES * 4)
            codes = layout.codes(builder, builder.add(_address(builder, block, line, LINE), i64(LINE)))
            for column, values in enumerate(codes):
                at = builder.add(place, i64(column * LANES * 4))
                before = splat_float(0.0) if first else load_lanes(builder, at, F32, None)
                _store(builder, multiply_add(builder, scaled, values, before), at)
            return []

        return counted_loop(builder, i64(0), i64(layout.lines), 1, [], add_line)

    counted_loop(builder, i64(0), i64(layout.groups), 1, [], add_group)


def _fold(builder: Any, sums: Any, out: Any) -> None:
    """out [128] = the sums of the 16 lanes of sums [128, 16]."""

    def fold(column: Any, _: list[Any]) -> list[Any]:
        place = _address(builder, sums, column, LANES * 4)
        lanes = [load_lanes(builder, builder.add(place, i64(LANES * 4 * n)), F32, None) for n in range(LANES)]
        _store(builder, _sum_lanes(builder, lanes), _address(builder, out, column, 4))
        return []

    counted_loop(builder, i64(0), i64(BLOCK_K), LANES, [], fold)


def _make_expand(fmt: PackedFormat) -> Any:
    @intrinsic
    def expand(typingctx, data, tiles, blocks, x, out):  # type: ignore[no-untyped-def]
        return _make(_emit_expand, fmt, 5)

    return expand


def _emit_expand(builder: Any, args: Any, layout: _Layout) -> None:
    data, tiles, blocks, x, out = args

    def one_tile(tile: Any, _: list[Any]) -> list[Any]:
        corner = _address(builder, data, builder.mul(tile, blocks), layout.fmt.block_bytes)

        def add_group(number: Any, state: list[Any]) -> list[Any]:
            block = _address(builder, corner, builder.udiv(number, i64(layout.groups)), layout.fmt.block_bytes)
            group = builder.urem(number, i64(layout.groups))
            total = _group_sum(builder, layout, block, group, _address(builder, x, number, layout.fmt.group * 4))
            return [multiply_add(builder, total, layout.scales(builder, block, group), state[0])]

        groups = builder.mul(blocks, i64(layout.groups))
        (total,) = counted_loop(builder, i64(0), groups, 1, [splat_float(0.0)], add_group)
        _store(builder, total, _address(builder, out, tile, TILE_ROWS * 4))
        return []

    counted_loop(builder, i64(0), tiles, 1, [], one_tile)


def _group_sum(builder: Any, layout: _Layout, block: Any, group: Any, x: Any) -> Any:
    """The codes of a group's columns times x [group], added up in each row."""

    def add_line(number: Any, sums: list[Any]) -> list[Any]:
        line, after = builder.add(_address(builder, i64(0), group, layout.lines), number), list(sums)
        codes = layout.codes(builder, builder.add(_address(builder, block, line, LINE), i64(LINE)))
        for column, values in enumerate(codes):
            place = builder.add(_address(builder, x, number, layout.columns * 4), i64(4 * column))
            factor = builder.load(builder.inttoptr(place, POINTER), typ=F32)
            factor.align = 4
            total = after[column % len(after)]
            after[column % len(after)] = multiply_add(builder, splat(builder, factor, VF), values, total)
        return after

    first, second, third, fourth = counted_loop(builder, i64(0), i64(layout.lines), 1, [splat_float(0.0)] * 4, add_line)
    return builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth))


_absorb_q8, _absorb_fast, _expand_q8, _expand_fast = (
    make(fmt) for make in (_make_absorb, _make_expand) for fmt in (Q8, FAST)
)


@inner
def absorb_packed(code, data, tiles, blocks, q, sums, out):  # type: ignore[no-untyped-def]
    """out [128 blocks] = q [16 tiles] times the rows of `tiles` tiles. sums: float32 [SUMS] for use on the way."""
    if code == Q8_HEADS:
        _absorb_q8(data, tiles, blocks, q, sums, out)
    else:
        _absorb_fast(data, tiles, blocks, q, sums, out)


@inner
def expand_packed(code, data, tiles, blocks, x, out):  # type: ignore[no-untyped-def]
    """out [16 tiles] = the rows of `tiles` tiles times x [128 blocks]."""
    if code == Q8_HEADS:
        _expand_q8(data, tiles, blocks, x, out)
    else:
        _expand_fast(data, tiles, blocks, x, out)

"""Packed rows times many tokens with AMX, whose instructions multiply tiles of bytes: 16 rows by 64 columns each.

A block of one or two tiles of 16 rows is unpacked once (tile_unpack.py) and multiplied with all tokens, 16 at a time
(tile_steps.py). A block's sums are those of packed_dot.py, exactly, and so is what follows: one product with
the scales, in order of k. So it does not matter which of the two ways a token takes.
"""

from typing import NamedTuple

from quant.kernels.activations import Inputs, k_blocks, record_bytes, record_of, scale_of
from quant.kernels.decode import ACCURATE_CODE, FAST_CODE
from quant.kernels.jit import inner, shared
from quant.kernels.packed_dot import ROW_BYTES, SLOTS, block_bytes
from quant.kernels.tile_steps import SUMS_BYTES, TOKENS, make_last, make_steps
from quant.kernels.tile_unpack import CHUNK_BYTES, make_unpack
from quant.kernels.tiles import floats, integers
from quant.packed import ACCURATE, BLOCK_K, FAST, LINE, Q8

TILE_TOKENS = 5  # from here on tiles are faster than packed_dot.py's four tokens at a time
# Scratch: two unpacked chunks, sums of two steps, a block without values, for what is not there.
APART = CHUNK_BYTES + 5 * LINE  # not half of 4 KiB, which would make them look alike
SUMS = 2 * APART
NOTHING = SUMS + SUMS_BYTES
NOTHING_BYTES = Q8.block_bytes
SCRATCH_BYTES = NOTHING + NOTHING_BYTES

_steps_fast, _steps_accurate, _steps_q8 = (make_steps(fmt) for fmt in (FAST, ACCURATE, Q8))
_last_fast, _last_accurate, _last_q8 = (make_last(fmt) for fmt in (FAST, ACCURATE, Q8))
_unpack_fast, _unpack_accurate, _unpack_q8 = (make_unpack(fmt) for fmt in (FAST, ACCURATE, Q8))


class Work(NamedTuple):
    """One call. used: address of the int64 numbers of the table's slots that hold one of the `tiles`.

    groups: of 16 tokens, from row `first` of the inputs on.
    """

    inputs: Inputs
    table: int
    used: int
    tiles: int
    groups: int
    first: int
    out: int
    scratch: int


@inner
def _find_used(table):  # type: ignore[no-untyped-def]
    """Write down, behind a table, which slots hold a tile; returns how many do."""
    slots = integers(table, (3 * SLOTS,))
    count = 0
    for slot in range(SLOTS):
        if slots[slot] != 0:
            slots[2 * SLOTS + count] = slot
            count += 1
    return count


@inner
def _width(code):  # type: ignore[no-untyped-def]
    """Tiles of a chunk."""
    return 1 if code == ACCURATE_CODE else 2


@inner
def _slot(work, place):  # type: ignore[no-untyped-def]
    """The slot at a place in `used`; of one beyond the last, of which nothing is used, the first."""
    return integers(work.used, (SLOTS,))[place if place < work.tiles else 0]


@inner
def _block(work, place, number):  # type: ignore[no-untyped-def]
    """Address of a block of a tile, or of one whose scales are 0 if there is no such block."""
    if place >= work.tiles or number >= k_blocks(work.inputs.k):
        return work.scratch + NOTHING
    return integers(work.table, (SLOTS,))[_slot(work, place)] + number * block_bytes(work.inputs.code)


@inner
def _later(work, place, number):  # type: ignore[no-untyped-def]
    """Address of a block of a tile, or of what is read after it."""
    slots, slot = integers(work.table, (2 * SLOTS,)), _slot(work, place)
    size, blocks = block_bytes(work.inputs.code), k_blocks(work.inputs.k)
    return slots[slot] + number * size if number < blocks else slots[SLOTS + slot] + (number - blocks) * size


@inner
def _results(work, chunk):  # type: ignore[no-untyped-def]
    """tile_steps.Results of a chunk: (block, place in `used` of its first tile)."""
    block, place = chunk
    scales = scale_of(work.inputs, work.first) + block * work.inputs.rows * 4
    first, second = work.out + _slot(work, place) * LINE, work.out + _slot(work, place + 1) * LINE
    return scales, _block(work, place, block), first, _block(work, place + 1, block), second


@inner
def _no_results(work):  # type: ignore[no-untyped-def]
    """Those of the first chunk, to which nothing is added."""
    nothing = work.scratch + NOTHING
    scales, _, first, _, second = _results(work, (0, 0))
    return scales, nothing, first, nothing, second


@inner
def _unpack_first(work, target):  # type: ignore[no-untyped-def]
    first, second, code = _block(work, 0, 0), _block(work, 1, 0), work.inputs.code
    if code == FAST_CODE:
        _unpack_fast((first, second, target))
    elif code == ACCURATE_CODE:
        _unpack_accurate((first, target))
    else:
        _unpack_q8((first, second, target))


@inner
def _run(work, now, before, then, unpacked, target):  # type: ignore[no-untyped-def]
    """Multiply a chunk with all tokens, and unpack the one of `then`.

    before: the results of the chunk before; returns its own.
    """
    inputs, code, block, place = work.inputs, work.inputs.code, then[0], then[1]
    x = record_of(inputs, work.first) + now[0] * BLOCK_K
    following = _block(work, place, block), _block(work, place + 1, block)
    later = _later(work, place, block + 1), _later(work, place + 1, block + 1)
    chunk = (x, record_bytes(inputs.k), unpacked, work.groups, work.scratch + SUMS) + following + (target,) + later
    results = _results(work, now)
    if code == FAST_CODE:
        _steps_fast(chunk + results + before)
    elif code == ACCURATE_CODE:
        _steps_accurate(chunk + results + before)
    else:
        _steps_q8(chunk + results + before)
    return results


@inner
def _add_last(work, results):  # type: ignore[no-untyped-def]
    args = (work.scratch + SUMS, work.groups)
    if work.inputs.code == FAST_CODE:
        _last_fast(args + results)
    elif work.inputs.code == ACCURATE_CODE:
        _last_accurate(args + results)
    else:
        _last_q8(args + results)


@inner
def _multiply_chunks(work):  # type: ignore[no-untyped-def]
    """A block of each tile, then the next one."""
    unpacked, other, width, results = work.scratch, work.scratch + APART, _width(work.inputs.code), _no_results(work)
    _unpack_first(work, unpacked)
    for block in range(k_blocks(work.inputs.k)):
        for place in range(0, work.tiles, width):
            then = (block, place + width) if place + width < work.tiles else (block + 1, 0)
            results = _run(work, (block, place), results, then, unpacked, other)
            unpacked, other = other, unpacked
    _add_last(work, results)


@inner
def multiply_tiles(inputs, table, first, size, out, scratch):  # type: ignore[no-untyped-def]
    """out float32 [size, 128] = rows `first` on of `inputs` times the tiles of a table (packed_rows.py).

    Rows of inputs and of `out` up to the next multiple of 16 are read and written. scratch, out: at cache lines.
    """
    groups, count = (size + TOKENS - 1) // TOKENS, _find_used(table)
    work = Work(inputs, table, table + 2 * SLOTS * 8, count, groups, first, out, scratch)
    floats(out, (groups * TOKENS * ROW_BYTES // 4,))[:] = 0
    integers(scratch + NOTHING, (NOTHING_BYTES // 8,))[:] = 0
    _multiply_chunks(work)


@shared
def uses_tiles(granted: int, tokens: int) -> bool:
    """Whether this many tokens of an expert, or of a linear, are multiplied with tiles where they are granted."""
    return granted != 0 and tokens >= TILE_TOKENS

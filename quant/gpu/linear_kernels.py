"""y = x W^T: weights of any format times bfloat16 activations on tensor cores, summed in float32.

One kernel serves decoding and prefill, which differ in the BLOCK_M tokens of a program. Where there are few tiles of
output, as in decoding, SPLITS programs share the columns of a tile; `sum_splits_kernel` adds their sums in a fixed
order.
"""

import triton
import triton.language as tl

from quant.gpu.weight_tiles import COLUMNS, weight_tile


@triton.jit
def linear_kernel(
    x,
    data,
    scale,
    out,
    tokens,
    rows,
    columns,
    blocks_each,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """x bf16 [tokens, columns]; out [SPLITS, tokens, rows], float32, or of x's dtype when there is one split.

    blocks_each: blocks of 128 columns that each split adds up.
    """
    first_row = tl.program_id(0) * BLOCK_N
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    first = split * blocks_each
    end = tl.minimum(first + blocks_each, tl.cdiv(columns, COLUMNS))
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(first, end):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        there = (token < tokens)[:, None] & (column < columns)[None, :]
        activations = tl.load(x + token[:, None] * columns + column[None, :], mask=there, other=0.0)
        weights, multipliers = weight_tile(data, scale, first_row, rows, columns, block, FORMAT, BLOCK_N)
        sums += tl.dot(activations, tl.trans(weights)) * multipliers[None, :]
    row = first_row + tl.arange(0, BLOCK_N)
    at = (split * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (row < rows)[None, :])


@triton.jit
def sum_splits_kernel(partial, out, count, splits, BLOCK: tl.constexpr):
    """out [count] = the sum over partial float32 [splits, count], in ascending order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * count + at, mask=at < count, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)

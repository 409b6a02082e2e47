"""Routed experts that live on the GPU: pairs of token and expert, sorted by expert, in blocks of one expert each.

The records are those of a store (quant/packed.py ExpertRecord), byte for byte. `hidden_kernel` gives
silu(w1 x) * (w3 x) of a block's pairs, `down_kernel` multiplies with w2 and with the pairs' weights, and
`combine_kernel` adds up each token's pairs in the order in which the router named them: the same call gives the same
bits.
"""

import triton
import triton.language as tl

from quant.gpu.weight_tiles import COLUMNS, weight_tile


@triton.jit
def hidden_kernel(
    x,
    records,
    block_experts,
    slots,
    hidden,
    pairs,
    top_k,
    dim,
    inter,
    record_words,
    w3_words,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """hidden bf16 [slots, inter]. x bf16 [tokens, dim]; records int32 [experts, record_words].

    block_experts int32 [blocks]: whose pairs a block of BLOCK_M slots holds, -1 for nobody's. slots int32: the pair in
    each slot, `pairs` where there is none.
    """
    expert = tl.load(block_experts + tl.program_id(1))
    if expert < 0:
        return
    slot = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.load(slots + slot)
    real = pair < pairs
    token = (pair // top_k).to(tl.int64)
    w1 = records + expert.to(tl.int64) * record_words
    first_row = tl.program_id(0) * BLOCK_N
    gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ups = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.cdiv(dim, COLUMNS)):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        there = real[:, None] & (column < dim)[None, :]
        values = tl.load(x + token[:, None] * dim + column[None, :], mask=there, other=0.0)
        weights, multipliers = weight_tile(w1, x, first_row, inter, dim, block, FORMAT, BLOCK_N)
        gates += tl.dot(values, tl.trans(weights)) * multipliers[None, :]
        weights, multipliers = weight_tile(w1 + w3_words, x, first_row, inter, dim, block, FORMAT, BLOCK_N)
        ups += tl.dot(values, tl.trans(weights)) * multipliers[None, :]
    activated = gates / (1.0 + tl.exp(-gates)) * ups
    row = first_row + tl.arange(0, BLOCK_N)
    at = slot.to(tl.int64)[:, None] * inter + row[None, :]
    tl.store(hidden + at, activated.to(tl.bfloat16), mask=real[:, None] & (row < inter)[None, :])


@triton.jit
def down_kernel(
    hidden,
    records,
    block_experts,
    slots,
    weights_of_pairs,
    outputs,
    pairs,
    dim,
    inter,
    record_words,
    w2_words,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """outputs float32 [pairs, dim] = weight of the pair × w2 × hidden bf16 [slots, inter]."""
    expert = tl.load(block_experts + tl.program_id(1))
    if expert < 0:
        return
    slot = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.load(slots + slot)
    real = pair < pairs
    w2 = records + expert.to(tl.int64) * record_words + w2_words
    first_row = tl.program_id(0) * BLOCK_N
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.cdiv(inter, COLUMNS)):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        there = real[:, None] & (column < inter)[None, :]
        values = tl.load(hidden + slot.to(tl.int64)[:, None] * inter + column[None, :], mask=there, other=0.0)
        weights, multipliers = weight_tile(w2, hidden, first_row, dim, inter, block, FORMAT, BLOCK_N)
        sums += tl.dot(values, tl.trans(weights)) * multipliers[None, :]
    share = tl.load(weights_of_pairs + pair, mask=real, other=0.0)
    row = first_row + tl.arange(0, BLOCK_N)
    at = pair.to(tl.int64)[:, None] * dim + row[None, :]
    tl.store(outputs + at, sums * share[:, None], mask=real[:, None] & (row < dim)[None, :])


@triton.jit
def combine_kernel(outputs, experts, out, top_k, dim, BLOCK: tl.constexpr):
    """out float32 [tokens, dim]: the sum of a token's rows of outputs [tokens, top_k, dim] whose experts are not -1."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(top_k):
        pair = (token * top_k + choice).to(tl.int64)
        here = tl.load(experts + pair) >= 0
        total += tl.load(outputs + pair * dim + column, mask=(column < dim) & here, other=0.0)
    tl.store(out + token.to(tl.int64) * dim + column, total, mask=column < dim)

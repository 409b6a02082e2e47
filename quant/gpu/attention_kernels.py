"""Attention over the latent cache (MLA): the cache is read in blocks, with an online softmax, and no score is stored.

Decoding absorbs wkv_b (DeepSeek-V2 paper, section 2.1.2): `absorb_kernel` turns queries into the latents' space,
`decode_kernel` attends there, each program to one part of the context, `join_splits_kernel` joins the parts and
`project_kernel` turns the sums of latents into values. BLOCK_H heads share what a program reads; programs of one part
of the context are neighbours in the grid, so that it comes from memory once and to the other heads from the L2 cache.
Long chunks of prefill run `prefill_kernel` over keys and values that were decompressed for one block of the context.

A cache row is bf16 [LORA + ROPE], or bytes: LORA int8, a float32 scale for each 128 of them, ROPE bf16. Exponents are
of 2: scores are multiplied with log2(e) beside attention's own scale.
"""

import triton
import triton.language as tl

from quant.gpu.weight_tiles import COLUMNS, weight_tile


@triton.jit
def absorb_kernel(
    q,
    data,
    scale,
    out,
    tokens,
    heads,
    rows,
    q_token,
    q_head,
    FORMAT: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    LORA: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """out bf16 [tokens, heads, LORA] = q [tokens, heads, NOPE] times each head's first NOPE rows of wkv_b.

    q_token, q_head: strides of q. rows: those of wkv_b, (NOPE + VALUE) a head.
    """
    head, block = tl.program_id(0), tl.program_id(1)
    token = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = (token < tokens)[:, None]
    weights, multipliers = weight_tile(data, scale, head * (NOPE + VALUE), rows, LORA, block, FORMAT, NOPE)
    scaled = (weights.to(tl.float32) * multipliers[:, None]).to(tl.bfloat16)
    queries = tl.load(q + token[:, None] * q_token + head * q_head + tl.arange(0, NOPE)[None, :], mask=there, other=0.0)
    sums = tl.dot(queries.to(tl.bfloat16), scaled)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    at = (token * heads + head).to(tl.int64)[:, None] * LORA + column[None, :]
    tl.store(out + at, sums.to(tl.bfloat16), mask=there & (column < LORA)[None, :])


@triton.jit
def project_kernel(
    latents,
    data,
    scale,
    out,
    tokens,
    heads,
    rows,
    FORMAT: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    LORA: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """out bf16 [tokens, heads, VALUE]: a head's last VALUE rows of wkv_b times latents bf16 [tokens, heads, LORA]."""
    head = tl.program_id(0)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = (token < tokens)[:, None]
    source = latents + (token * heads + head).to(tl.int64)[:, None] * LORA
    sums = tl.zeros([BLOCK_T, VALUE], tl.float32)
    for block in range(tl.cdiv(LORA, COLUMNS)):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        values = tl.load(source + column[None, :], mask=there & (column < LORA)[None, :], other=0.0)
        first_row = head * (NOPE + VALUE) + NOPE
        weights, multipliers = weight_tile(data, scale, first_row, rows, LORA, block, FORMAT, VALUE)
        sums += tl.dot(values, tl.trans(weights)) * multipliers[None, :]
    at = (token * heads + head).to(tl.int64)[:, None] * VALUE + tl.arange(0, VALUE)[None, :]
    tl.store(out + at, sums.to(tl.bfloat16), mask=there)


@triton.jit
def _latent_rows(cache, scales, row, there, LORA: tl.constexpr, ROPE: tl.constexpr, BYTES: tl.constexpr):
    """The latents of cache rows as bf16 [rows, LORA]."""
    column = tl.arange(0, LORA)
    if not BYTES:
        return tl.load(cache + row[:, None] * (LORA + ROPE) + column[None, :], mask=there[:, None], other=0.0)
    GROUP: tl.constexpr = min(LORA, 128)
    GROUPS: tl.constexpr = LORA // GROUP
    WIDTH: tl.constexpr = LORA + 4 * GROUPS + 2 * ROPE
    codes = tl.load(cache + row[:, None] * WIDTH + column[None, :], mask=there[:, None], other=0)
    at = row[:, None] * (WIDTH // 4) + LORA // 4 + tl.arange(0, GROUPS)[None, :]
    factors = tl.load(scales + at, mask=there[:, None], other=0.0)
    values = tl.reshape(codes.to(tl.float32), row.shape[0], GROUPS, GROUP) * factors[:, :, None]
    return tl.reshape(values, row.shape[0], LORA).to(tl.bfloat16)


@triton.jit
def _rope_rows(ropes, row, there, LORA: tl.constexpr, ROPE: tl.constexpr, BYTES: tl.constexpr):
    """The turned keys of cache rows, bf16 [rows, ROPE]. ropes: the cache as bf16."""
    FIRST: tl.constexpr = (LORA + 4 * (LORA // min(LORA, 128))) // 2 if BYTES else LORA
    at = row[:, None] * (FIRST + ROPE) + FIRST + tl.arange(0, ROPE)[None, :]
    return tl.load(ropes + at, mask=there[:, None], other=0.0)


@triton.jit
def _softmax_step(scores, values, maximum, total, sums):
    """The online softmax with further keys: scores float32 [queries, keys], values bf16 [keys, width].

    maximum, total: float32 [queries]; sums: float32 [queries, width]. All three are returned.
    """
    higher = tl.maximum(maximum, tl.max(scores, 1))
    shares = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(maximum - higher)
    total = total * shrink + tl.sum(shares, 1)
    return higher, total, tl.dot(shares.to(tl.bfloat16), values, sums * shrink[:, None])


@triton.jit
def decode_kernel(
    q_latent,
    q_pe,
    cache,
    scales,
    ropes,
    seen,
    partial,
    stats,
    tokens,
    heads,
    scale,
    LORA: tl.constexpr,
    ROPE: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One part of the context for BLOCK_H heads of one token.

    q_latent bf16 [tokens, heads, LORA], q_pe bf16 [tokens, heads, ROPE]. cache, scales, ropes: the cache [capacity,
    bytes] as bf16 or int8, as float32 and as bf16. seen int32 [1]: tokens in the cache, of which the queries are the
    last; in memory, so that a recorded graph serves every position. partial float32 [splits, tokens, heads, LORA];
    stats float32 [2, splits, tokens, heads]: maxima of scores and sums of their exponentials.
    """
    head_blocks = tl.cdiv(heads, BLOCK_H)
    token = tl.program_id(0) // head_blocks
    head = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    split, splits = tl.program_id(1), tl.num_programs(1)
    stored = tl.load(seen)
    each = tl.cdiv(tl.cdiv(stored, splits), BLOCK_S) * BLOCK_S
    first = split * each
    end = tl.minimum(first + each, stored - tokens + token + 1)

    pair = token * heads + head
    real = (head < heads)[:, None]
    queries = tl.load(q_latent + pair[:, None] * LORA + tl.arange(0, LORA)[None, :], mask=real, other=0.0)
    turned = tl.load(q_pe + pair[:, None] * ROPE + tl.arange(0, ROPE)[None, :], mask=real, other=0.0)
    maximum = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    sums = tl.zeros([BLOCK_H, LORA], tl.float32)
    for start in range(first, end, BLOCK_S):
        row = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        there = row < end
        latents = _latent_rows(cache, scales, row, there, LORA, ROPE, BYTES)
        keys = _rope_rows(ropes, row, there, LORA, ROPE, BYTES)
        scores = tl.dot(queries, tl.trans(latents))
        scores = tl.dot(turned, tl.trans(keys), scores) * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        maximum, total, sums = _softmax_step(scores, latents, maximum, total, sums)

    slot = split * tokens * heads + pair
    at = slot.to(tl.int64)[:, None] * LORA + tl.arange(0, LORA)[None, :]
    tl.store(partial + at, sums, mask=real)
    tl.store(stats + slot, maximum, mask=head < heads)
    tl.store(stats + splits * tokens * heads + slot, total, mask=head < heads)


@triton.jit
def join_splits_kernel(partial, stats, out, pairs, splits, LORA: tl.constexpr):
    """out bf16 [pairs, LORA]: the parts of `decode_kernel`, weighed by their exponentials, in ascending order."""
    pair = tl.program_id(0)
    column = tl.arange(0, LORA)
    maximum = tl.load(stats + pair)
    for split in range(1, splits):
        maximum = tl.maximum(maximum, tl.load(stats + split * pairs + pair))
    sums = tl.zeros([LORA], tl.float32)
    total = 0.0
    for split in range(splits):
        slot = split * pairs + pair
        share = tl.exp2(tl.load(stats + slot) - maximum)
        total += share * tl.load(stats + splits * pairs + slot)
        sums += share * tl.load(partial + slot.to(tl.int64) * LORA + column)
    tl.store(out + pair.to(tl.int64) * LORA + column, (sums / total).to(tl.bfloat16))


@triton.jit
def _carried(sums, stats, pair, pairs, known, VALUE: tl.constexpr):
    """What earlier blocks of keys left of the softmax: its maximum, total and weighted sum; nothing unless `known`."""
    maximum = tl.load(stats + pair, mask=known, other=float("-inf"))
    total = tl.load(stats + pairs + pair, mask=known, other=0.0)
    at = pair.to(tl.int64)[:, None] * VALUE + tl.arange(0, VALUE)[None, :]
    return maximum, total, tl.load(sums + at, mask=known[:, None], other=0.0)


@triton.jit
def _carry(sums, stats, pair, pairs, real, maximum, total, weighted, VALUE: tl.constexpr):
    """Leave the same to the next block of keys."""
    at = pair.to(tl.int64)[:, None] * VALUE + tl.arange(0, VALUE)[None, :]
    tl.store(sums + at, weighted, mask=real[:, None])
    tl.store(stats + pair, maximum, mask=real)
    tl.store(stats + pairs + pair, total, mask=real)


@triton.jit
def prefill_kernel(
    q_nope,
    q_pe,
    kv,
    ropes,
    sums,
    stats,
    out,
    tokens,
    heads,
    first_key,
    keys,
    seen,
    q_token,
    q_head,
    scale,
    LORA: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """BLOCK_T queries of one head against the `keys` keys from `first_key` on, of `seen` that end with the queries.

    q_nope [tokens, heads, NOPE] with strides q_token and q_head; q_pe [tokens, heads, ROPE]. kv bf16 [keys, heads,
    NOPE + VALUE]. ropes: the cache as bf16, from its first row on. sums float32 [tokens, heads, VALUE] and stats
    float32 [2, tokens, heads] carry the softmax from one block of keys to the next; the last one writes out.
    """
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = token < tokens
    pair = token * heads + head
    value = tl.arange(0, VALUE)
    queries = tl.load(
        q_nope + token[:, None] * q_token + head * q_head + tl.arange(0, NOPE)[None, :], mask=real[:, None], other=0.0
    ).to(tl.bfloat16)
    turned = tl.load(q_pe + pair[:, None] * ROPE + tl.arange(0, ROPE)[None, :], mask=real[:, None], other=0.0)
    maximum, total, weighted = _carried(sums, stats, pair, tokens * heads, real & (first_key > 0), VALUE)

    last_seen = seen - tokens + token - first_key  # the last key that each query sees, counted in this block
    end = tl.minimum(keys, seen - tokens + tl.program_id(0) * BLOCK_T + BLOCK_T - first_key)
    for start in range(0, end, BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        there = key < keys
        rows = kv + (key * heads + head).to(tl.int64)[:, None] * (NOPE + VALUE)
        k_nope = tl.load(rows + tl.arange(0, NOPE)[None, :], mask=there[:, None], other=0.0)
        k_pe = _rope_rows(ropes, (first_key + key).to(tl.int64), there, LORA, ROPE, BYTES)
        scores = tl.dot(queries, tl.trans(k_nope))
        scores = tl.dot(turned.to(tl.bfloat16), tl.trans(k_pe), scores) * scale
        scores = tl.where(there[None, :] & (key[None, :] <= last_seen[:, None]), scores, float("-inf"))
        values = tl.load(rows + NOPE + value[None, :], mask=there[:, None], other=0.0)
        maximum, total, weighted = _softmax_step(scores, values, maximum, total, weighted)

    if first_key + keys < seen:
        _carry(sums, stats, pair, tokens * heads, real, maximum, total, weighted, VALUE)
    else:
        result = (weighted / total[:, None]).to(tl.bfloat16)
        tl.store(out + pair.to(tl.int64)[:, None] * VALUE + value[None, :], result, mask=real[:, None])

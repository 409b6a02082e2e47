"""What a forward pass needs beside weights and cache, as formulas: the planner sets it aside, the ledger checks it.

Each function here is one moment at which much lives at a time; the names of its terms are those of the variables in
hybrid_rt/latent_attention.py and hybrid_rt/layers.py, locals of a loop's last round included, which live until they are
assigned again. Nothing depends on the length of the context.

Shapes: T tokens of a chunk, S cached tokens of a block, H heads, C = kv_lora, D dim, E routed experts.
"""

import os
from dataclasses import dataclass

from offload.plan import DECODED, Plan
from quant.config import ModelConfig
from quant.gpu import shapes
from quant.inventory import CacheFormat
from quant.packed import BLOCK_K

# The numbers of hybrid_rt/latent_attention.py, which the planner cannot import; a test compares them.
ABSORBED_UP_TO = 128
PREFILL_BLOCK = 512
DECODE_BLOCK = 2048

F32 = 4
TOKENS_ON_DEVICE = 256  # that experts on the device run at a time
SMALL_TENSORS = 64 * 512  # masks' aranges, ids and the like: each takes at least one unit of the allocator
SCRATCH_ROWS = 32  # weight rows that a thread of the kernels for FP8 and bf16 experts decodes together
FEW_PAIRS = 64  # the kernel for packed experts keeps hidden values of so many,
PADDED_ROWS = 32  # reads up to so many rows more than there are,
ROW_SCRATCH = 1088  # and takes so many bytes for a token in each thread,
THREAD_SCRATCH = 2**16  # and for what the thread unpacks
THREADS = max(64, os.cpu_count() or 1)  # threads whose scratch is set aside


def device_experts_bytes(tokens: int, top_k: int, dim: int, inter_dim: int) -> int:
    """Device memory that experts there take beside their result (offload/device_experts.py), some tokens at a time.

    Rows of each pair of token and expert, their hidden values, and the tokens' sums.
    """
    rows = min(tokens, TOKENS_ON_DEVICE)
    pairs = rows * top_k
    return 4 * pairs * dim + 2 * 2 * pairs * inter_dim + 4 * rows * dim


def workspace_bytes(config: ModelConfig, plan: Plan) -> int:
    """Bytes of temporaries of a plan's forward passes, and of the logits of one token.

    `wkv_b` counts, in float32, for the layer that is computed.
    """
    return _workspace(config, plan, plan.gpu_experts() > 0)


def device_expert_bytes(config: ModelConfig, plan: Plan) -> int:
    """Bytes of workspace that the first experts on a GPU add to a plan that has none there."""
    return _workspace(config, plan, True) - _workspace(config, plan, False)


def _workspace(config: ModelConfig, plan: Plan, has_experts: bool) -> int:
    act = F32 if plan.dtype == "float32" else 2
    lengths = (plan.prefill_chunk, min(plan.prefill_chunk, ABSORBED_UP_TO))  # the two forms of attention
    kernels = plan.device == "cuda" and act == 2 and _attends_by_kernels(config, plan)
    passes = [
        _Pass(config, tokens, act, plan.cache_format, has_experts, kernels, plan.streams(tokens)).peak
        for tokens in lengths
    ]
    logits = config.vocab_size * (act + F32)
    unpacked = 0
    if not plan.on_gpu and plan.cache_format == "int8":  # the CPU unpacks a layer's rows as a whole
        unpacked = plan.context * config.latent_dim * 2 * F32
    return max(*passes, logits) + SMALL_TENSORS + unpacked


def _attends_by_kernels(config: ModelConfig, plan: Plan) -> bool:
    widths = config.qk_nope_head_dim, config.v_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    return shapes.reads_heads(*widths) and plan.representation(0, "kv_b") != "f32"


def host_bytes(config: ModelConfig, chunk: int) -> int:
    """Bytes of the host buffers of offload/experts.py for up to `chunk` tokens."""
    pairs = chunk * config.n_activated_experts
    inputs_and_output = 2 * (chunk + DECODED) * config.dim * F32 + pairs * (8 + F32)  # two rows are of deferred ones
    order = 8 * (2 * config.n_routed_experts + 3 + pairs)
    return inputs_and_output + order + max(_packed_scratch(config, chunk), _plain_scratch(config, chunk))


def _packed_scratch(config: ModelConfig, chunk: int) -> int:
    """Of packed experts: x of tokens and, for AMX, of pairs, hidden values of pairs, and of few pairs in float32."""
    pairs = chunk * config.n_activated_experts
    quantised = _quantised_bytes(chunk + pairs, config.dim) + _quantised_bytes(pairs, config.moe_inter_dim)
    kept = FEW_PAIRS * _whole_blocks(config.moe_inter_dim) * F32
    return quantised + kept + THREADS * ((chunk + PADDED_ROWS) * ROW_SCRATCH + THREAD_SCRATCH)


def _plain_scratch(config: ModelConfig, chunk: int) -> int:
    """Of FP8 and bf16 experts: hidden values of pairs, and rows that each thread decodes."""
    hidden = chunk * config.n_activated_experts * _whole_blocks(config.moe_inter_dim) * F32
    return hidden + THREADS * SCRATCH_ROWS * max(config.dim, config.moe_inter_dim) * F32


def _quantised_bytes(rows: int, columns: int) -> int:
    """Of rows of 8-bit activations: for each 128, 8 sums of 4 bytes and a scale; up to two cache lines a row."""
    return (rows + PADDED_ROWS) * (_whole_blocks(columns) // BLOCK_K * (BLOCK_K + 8 * 4 + F32) + 2 * 64)


def _whole_blocks(columns: int) -> int:
    return -(-columns // BLOCK_K) * BLOCK_K


@dataclass(frozen=True)
class _Pass:
    """One forward pass of `tokens` tokens. act: bytes of an activation. has_experts: whether the device has some."""

    config: ModelConfig
    tokens: int
    act: int
    cache: CacheFormat
    has_experts: bool
    kernels: bool  # whether attention is that of hybrid_rt/gpu_attention.py
    streams: bool  # whether experts in RAM are sent to the device

    @property
    def peak(self) -> int:
        config, tokens = self.config, self.tokens
        x = tokens * config.dim * self.act
        turns = tokens * (config.qk_rope_head_dim * F32 + 8)  # angles and positions
        beside_all = 2 * x + turns  # the residual stream and its normed copy
        norm = 3 * tokens * config.dim * F32
        attention = self._attention_by_kernels if self.kernels else self._attention
        return beside_all + max(norm, attention, self._feed_forward)

    @property
    def _attention(self) -> int:
        config, tokens = self.config, self.tokens
        q_pe = tokens * config.n_heads * config.qk_rope_head_dim
        q = tokens * config.n_heads * config.qk_head_dim * self.act
        heads = tokens * config.n_heads * config.v_head_dim * self.act
        wkv_b = config.n_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank * F32
        latent = tokens * config.latent_dim * self.act
        attend = self._absorbed if tokens <= ABSORBED_UP_TO else self._decompressed
        turning = 3 * q_pe * F32
        decoding = 3 * wkv_b  # of FP8: the values, their scales and the product
        output = wkv_b + 2 * heads + tokens * config.dim * self.act
        return q + max(turning, q_pe * self.act + latent + max(decoding, wkv_b + attend, output))

    @property
    def _attention_by_kernels(self) -> int:
        config, tokens = self.config, self.tokens
        q_pe = tokens * config.n_heads * config.qk_rope_head_dim
        q = tokens * config.n_heads * config.qk_head_dim * self.act
        heads = tokens * config.n_heads * config.v_head_dim * self.act
        latent = tokens * config.latent_dim * self.act
        few = tokens <= ABSORBED_UP_TO
        attend = heads + (self._absorbed_by_kernels if few else self._decompressed_by_kernels)
        turning = 3 * q_pe * F32
        return q + max(turning, q_pe * self.act + max(latent + attend, heads + tokens * config.dim * self.act))

    @property
    def _absorbed_by_kernels(self) -> int:
        config, rows = self.config, self.config.n_heads * self.tokens
        splits = shapes.decode_splits(self.tokens, config.n_heads, self.cache == "int8")
        return rows * (2 * config.kv_lora_rank * self.act + splits * (config.kv_lora_rank + 2) * F32)

    @property
    def _decompressed_by_kernels(self) -> int:
        """Latents and what they are decompressed to, of two rounds."""
        config, rows = self.config, self.config.n_heads * self.tokens
        wide = config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
        unpacked = 2 * config.kv_lora_rank * F32 if self.cache == "int8" else 0
        block = shapes.KEY_BLOCK * (2 * (config.kv_lora_rank + wide) * self.act + unpacked)
        return block + rows * (config.v_head_dim + 2) * F32

    @property
    def _decompressed(self) -> int:
        config, rows, block = self.config, self.config.n_heads * self.tokens * F32, PREFILL_BLOCK
        queries, weighted, scores = rows * config.qk_head_dim, rows * config.v_head_dim, rows * block
        kv = config.n_heads * block * (config.qk_nope_head_dim + config.v_head_dim) * F32
        keys = config.n_heads * block * config.qk_head_dim * F32
        second = max(kv, keys, scores, 2 * weighted)  # what the loop makes while the last round's still lives
        kept = queries + kv + keys + scores + weighted + self._small(block)
        return max(2 * queries, kept + second)

    @property
    def _absorbed(self) -> int:
        config, rows, block = self.config, self.config.n_heads * self.tokens * F32, DECODE_BLOCK
        q_latent = weighted = rows * config.kv_lora_rank
        queries, scores = rows * config.latent_dim, rows * block
        kept = q_latent + queries + scores + weighted + self._small(block)
        return max(q_latent + 3 * queries, kept + max(scores, 2 * weighted))

    def _small(self, block: int) -> int:
        """The latents of two rounds (of a float32 cache they are views), rows' maxima and totals, and the mask.

        Unpacking latents of 8 bits takes spread scales, the product and the result beside those of the last round.
        """
        rounds = {"float32": 0, "bfloat16": 2, "int8": 4}[self.cache]
        latents = rounds * block * self.config.latent_dim * F32
        return latents + 8 * self.config.n_heads * self.tokens * F32 + self.tokens * block

    @property
    def _feed_forward(self) -> int:
        """The layer's input lives on beside the residual stream that attention was added to."""
        config, row = self.config, self.tokens * self.config.dim
        dense = self._mlp(config.inter_dim) if config.n_dense_layers else 0
        gate = row * F32 + 6 * self.tokens * config.n_routed_experts * F32
        shared = self._mlp(config.n_shared_experts * config.moe_inter_dim)
        sync = row * F32 + 3 * row * self.act + (row * F32 if self.has_experts else 0)
        submitted = row * F32 + 12 * self.tokens * config.n_activated_experts
        running = 0
        if self.has_experts:  # their sum, and what they and the CPU get
            submitted += row * F32 + 36 * self.tokens * config.n_activated_experts
            running = device_experts_bytes(self.tokens, config.n_activated_experts, config.dim, config.moe_inter_dim)
        mixture = max(gate, submitted + max(running, shared, sync)) if config.n_moe_layers else 0
        if self.streams:
            mixture = max(mixture, self._streaming)
        return row * self.act + max(dense, mixture)

    @property
    def _streaming(self) -> int:
        """Sums of all slices and of one, what that takes, and the shared expert's result; then the sum's conversion.

        Beside those of experts that live on the device, if there are some.
        """
        config, row = self.config, self.tokens * self.config.dim
        chosen = self.tokens * config.n_activated_experts
        running = device_experts_bytes(self.tokens, config.n_activated_experts, config.dim, config.moe_inter_dim)
        here = row * F32 if self.has_experts else 0
        return here + 28 * chosen + row * self.act + 2 * row * F32 + running

    def _mlp(self, inter: int) -> int:
        """The gate, the up projection, silu of the gate and the product; then the product and the result."""
        hidden = self.tokens * inter * self.act
        return max(4 * hidden, hidden + self.tokens * self.config.dim * self.act)

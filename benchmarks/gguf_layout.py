"""llama.cpp's tensors of a model, by name and shape, and what its quantiser says of them. Needs only Python."""

import re

from quant.config import ModelConfig

Shape = tuple[int, ...]  # rows last but one, columns last, as in NumPy
TYPE_LINE = re.compile(r"\] +(\S+) +- \[[^]]*\], type = +(\w+), size = [^(\n]*(?:\((\w+)\))?")


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """All tensors of the architecture "deepseek2", in the order of the file."""
    top = (config.vocab_size, config.dim)
    shapes: dict[str, Shape] = {"token_embd.weight": top, "output_norm.weight": (config.dim,), "output.weight": top}
    for layer in range(config.n_layers):
        ffn = moe_shapes(config) if config.is_moe(layer) else dense_shapes(config)
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in {**attention_shapes(config), **ffn}.items()}
    return shapes


def stays_float(name: str, shape: Shape) -> bool:
    """Whether a tensor is never quantised."""
    return len(shape) == 1 or name.endswith("ffn_gate_inp.weight")


def attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Multi-head latent attention; the matrix of keys and values is split into two, with a matrix for each head."""
    queries, rank, heads = config.n_heads * config.qk_head_dim, config.q_lora_rank, config.n_heads
    query: dict[str, Shape] = {"attn_q.weight": (queries, config.dim)}
    if rank:
        query = {"attn_q_a.weight": (rank, config.dim), "attn_q_a_norm.weight": (rank,)}
        query["attn_q_b.weight"] = (queries, rank)
    return {
        "attn_norm.weight": (config.dim,),
        **query,
        "attn_kv_a_mqa.weight": (config.latent_dim, config.dim),
        "attn_kv_a_norm.weight": (config.kv_lora_rank,),
        "attn_k_b.weight": (heads, config.kv_lora_rank, config.qk_nope_head_dim),
        "attn_v_b.weight": (heads, config.v_head_dim, config.kv_lora_rank),
        "attn_output.weight": (config.dim, heads * config.v_head_dim),
        "ffn_norm.weight": (config.dim,),
    }


def dense_shapes(config: ModelConfig) -> dict[str, Shape]:
    """A dense layer's MLP."""
    wide = (config.inter_dim, config.dim)
    return {"ffn_gate.weight": wide, "ffn_up.weight": wide, "ffn_down.weight": wide[::-1]}


def moe_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Router, routed experts and the shared one."""
    experts, wide = config.n_routed_experts, (config.moe_inter_dim, config.dim)
    shared = (config.n_shared_experts * config.moe_inter_dim, config.dim)
    return {
        "ffn_gate_inp.weight": (experts, config.dim),
        "exp_probs_b.bias": (experts,),
        "ffn_gate_exps.weight": (experts, *wide),
        "ffn_up_exps.weight": (experts, *wide),
        "ffn_down_exps.weight": (experts, *wide[::-1]),
        "ffn_gate_shexp.weight": shared,
        "ffn_up_shexp.weight": shared,
        "ffn_down_shexp.weight": shared[::-1],
    }


def types_in(text: str) -> dict[str, str]:
    """Names of types by tensor, from the quantiser's lines: after the arrow where one changes, else the one it has."""
    return {name: (new or old).upper() for name, old, new in TYPE_LINE.findall(text)}

"""The names of tensors: ours, after DeepSeek-V3's inference/model.py, and those of the published checkpoints.

One table, read in both directions. `#` stands for a layer or expert number.
"""

import re

from quant.errors import CheckpointError

SCALE_SUFFIX = "_scale_inv"
# Buffers that some conversions kept (Kimi-K2's among them); they follow from config.json.
IGNORED_SUFFIXES = (".self_attn.rotary_emb.inv_freq",)

NAMES: dict[str, str] = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.#.attn_norm": "model.layers.#.input_layernorm.weight",
    "layers.#.ffn_norm": "model.layers.#.post_attention_layernorm.weight",
    # mla
    "layers.#.attn.wq": "model.layers.#.self_attn.q_proj.weight",
    "layers.#.attn.wq_a": "model.layers.#.self_attn.q_a_proj.weight",
    "layers.#.attn.q_norm": "model.layers.#.self_attn.q_a_layernorm.weight",
    "layers.#.attn.wq_b": "model.layers.#.self_attn.q_b_proj.weight",
    "layers.#.attn.wkv_a": "model.layers.#.self_attn.kv_a_proj_with_mqa.weight",
    "layers.#.attn.kv_norm": "model.layers.#.self_attn.kv_a_layernorm.weight",
    "layers.#.attn.wkv_b": "model.layers.#.self_attn.kv_b_proj.weight",
    "layers.#.attn.wo": "model.layers.#.self_attn.o_proj.weight",
    # dense and moe
    "layers.#.ffn.w1": "model.layers.#.mlp.gate_proj.weight",
    "layers.#.ffn.w2": "model.layers.#.mlp.down_proj.weight",
    "layers.#.ffn.w3": "model.layers.#.mlp.up_proj.weight",
    "layers.#.ffn.gate.weight": "model.layers.#.mlp.gate.weight",
    "layers.#.ffn.gate.bias": "model.layers.#.mlp.gate.e_score_correction_bias",
    "layers.#.ffn.experts.#.w1": "model.layers.#.mlp.experts.#.gate_proj.weight",
    "layers.#.ffn.experts.#.w2": "model.layers.#.mlp.experts.#.down_proj.weight",
    "layers.#.ffn.experts.#.w3": "model.layers.#.mlp.experts.#.up_proj.weight",
    "layers.#.ffn.shared_experts.w1": "model.layers.#.mlp.shared_experts.gate_proj.weight",
    "layers.#.ffn.shared_experts.w2": "model.layers.#.mlp.shared_experts.down_proj.weight",
    "layers.#.ffn.shared_experts.w3": "model.layers.#.mlp.shared_experts.up_proj.weight",
    # mtp
    "layers.#.enorm": "model.layers.#.enorm.weight",
    "layers.#.hnorm": "model.layers.#.hnorm.weight",
    "layers.#.eh_proj": "model.layers.#.eh_proj.weight",
    "layers.#.shared_head.norm": "model.layers.#.shared_head.norm.weight",
    "layers.#.shared_head.head": "model.layers.#.shared_head.head.weight",
    "layers.#.embed": "model.layers.#.embed_tokens.weight",
}
OURS = {published: ours for ours, published in NAMES.items()}
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]*)(?=\.)")


def published_name(name: str) -> str:
    """The published name of one of our tensors. Raises CheckpointError for a name that is not in the table."""
    return _rename(name, NAMES)


def our_name(source: str) -> str:
    """Our name of a published tensor. Raises CheckpointError for a name that is not in the table."""
    return _rename(source, OURS)


def _rename(name: str, table: dict[str, str]) -> str:
    renamed = table.get(_NUMBER.sub("#", name))
    if renamed is None or "#" in name:
        raise CheckpointError(
            f"tensor {name!r} is not part of the DeepSeek-V3 architecture; "
            "give a checkpoint of DeepSeek-V3, R1 or a relative"
        )
    return fill(renamed, *_NUMBER.findall(name))


def fill(pattern: str, *numbers: int | str) -> str:
    """Put `numbers` in the place of each `#` of `pattern`, in order."""
    for number in numbers:
        pattern = pattern.replace("#", str(number), 1)
    return pattern

"""Small checkpoints with random weights, in the form in which DeepSeek-R1 is published.

    write_checkpoint(tmp_path)                        # FP8, 3 layers (1 dense) and an MTP layer, 3 shards
    write_checkpoint(tmp_path, RAGGED)                # no dimension a multiple of 128
    write_checkpoint(tmp_path, BF16 | NO_Q_LORA, seed=7, shards=1)

Tensor names and shapes are written out here once more, on purpose, and not taken from the inventory that they test.
The same seed gives the same bytes. Weights keep activations near 1 through all layers.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quant.fp8 import encode

Fields = dict[str, Any]
Tensors = dict[str, torch.Tensor]

TINY: Fields = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 384,
    "kv_lora_rank": 128,
    "max_position_embeddings": 2560,
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 32,
    "vocab_size": 512,
}

# Overrides to combine with `|`. None removes a key, but for q_lora_rank, whose published form is null.
RAGGED: Fields = {
    "first_k_dense_replace": 2,
    "hidden_size": 208,
    "intermediate_size": 304,
    "kv_lora_rank": 80,
    "moe_intermediate_size": 144,
    "n_group": 3,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_attention_heads": 3,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 144,
    "qk_nope_head_dim": 48,
    "v_head_dim": 48,
    "vocab_size": 400,
}
BF16: Fields = {"quantization_config": None}
NO_Q_LORA: Fields = {"q_lora_rank": None}
NO_MTP: Fields = {"num_nextn_predict_layers": None}

R1: Fields = {
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": {**TINY["rope_scaling"], "original_max_position_embeddings": 4096},
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}  # DeepSeek-R1 itself: for sizes only

EMBED_GAIN = 1.0
RESIDUAL_GAIN = 0.5  # of what a layer adds, so that the stream grows slowly
BLOCK_SPREAD = 0.4  # unequal blocks, so that a mixed-up scale shows


def tiny_config(overrides: Mapping[str, Any] | None = None) -> Fields:
    """The fields of config.json: TINY with `overrides`."""
    fields = {**TINY, **(overrides or {})}
    return {key: value for key, value in fields.items() if value is not None or key == "q_lora_rank"}


def tiny_shapes(fields: Fields) -> dict[str, tuple[str, tuple[int, ...], float]]:
    """Published name -> (kind, shape, gain); kind: linear, plain (never FP8), norm, router_bias."""
    dim, vocab, layers = fields["hidden_size"], fields["vocab_size"], fields["num_hidden_layers"]
    shapes: dict[str, tuple[str, tuple[int, ...], float]] = {
        "model.embed_tokens.weight": ("plain", (vocab, dim), EMBED_GAIN * dim**0.5)
    }
    for layer in range(layers + fields.get("num_nextn_predict_layers", 0)):
        for name, kind, shape, gain in _layer(fields, layer, is_mtp=layer >= layers):
            shapes[f"model.layers.{layer}.{name}.weight"] = (kind, shape, gain)
        if layer >= fields["first_k_dense_replace"]:
            bias = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            shapes[bias] = ("router_bias", (fields["n_routed_experts"],), 0.1)
    shapes["model.norm.weight"] = ("norm", (dim,), 0.1)
    shapes["lm_head.weight"] = ("plain", (vocab, dim), 2.0)
    return shapes


Row = tuple[str, str, tuple[int, ...], float]


def _layer(fields: Fields, layer: int, is_mtp: bool) -> Iterator[Row]:
    dim = fields["hidden_size"]
    yield "input_layernorm", "norm", (dim,), 0.1
    yield from _attention(fields)
    yield "post_attention_layernorm", "norm", (dim,), 0.1
    if layer < fields["first_k_dense_replace"]:
        yield from _mlp("mlp", dim, fields["intermediate_size"])
    else:
        yield from _moe(fields)
    if is_mtp:
        yield "enorm", "norm", (dim,), 0.1
        yield "hnorm", "norm", (dim,), 0.1
        yield "eh_proj", "plain", (dim, 2 * dim), 1.0
        yield "shared_head.norm", "norm", (dim,), 0.1
        yield "shared_head.head", "plain", (fields["vocab_size"], dim), 2.0
        yield "embed_tokens", "plain", (fields["vocab_size"], dim), EMBED_GAIN * dim**0.5


def _attention(fields: Fields) -> Iterator[Row]:
    dim, heads, rank = fields["hidden_size"], fields["num_attention_heads"], fields["kv_lora_rank"]
    nope, rope, value = fields["qk_nope_head_dim"], fields["qk_rope_head_dim"], fields["v_head_dim"]
    queries = heads * (nope + rope)
    if fields["q_lora_rank"] is None:
        yield "self_attn.q_proj", "linear", (queries, dim), 1.0
    else:
        yield "self_attn.q_a_proj", "linear", (fields["q_lora_rank"], dim), 1.0
        yield "self_attn.q_a_layernorm", "norm", (fields["q_lora_rank"],), 0.1
        yield "self_attn.q_b_proj", "linear", (queries, fields["q_lora_rank"]), 1.0
    yield "self_attn.kv_a_proj_with_mqa", "linear", (rank + rope, dim), 1.0
    yield "self_attn.kv_a_layernorm", "norm", (rank,), 0.1
    yield "self_attn.kv_b_proj", "linear", (heads * (nope + value), rank), 1.0
    yield "self_attn.o_proj", "linear", (dim, heads * value), RESIDUAL_GAIN


def _moe(fields: Fields) -> Iterator[Row]:
    dim, inter = fields["hidden_size"], fields["moe_intermediate_size"]
    yield "mlp.gate", "plain", (fields["n_routed_experts"], dim), 1.0
    for expert in range(fields["n_routed_experts"]):
        yield from _mlp(f"mlp.experts.{expert}", dim, inter)
    yield from _mlp("mlp.shared_experts", dim, inter * fields["n_shared_experts"])


def _mlp(prefix: str, dim: int, inter: int) -> Iterator[Row]:
    yield f"{prefix}.gate_proj", "linear", (inter, dim), 1.0
    yield f"{prefix}.up_proj", "linear", (inter, dim), 1.0
    yield f"{prefix}.down_proj", "linear", (dim, inter), 2 * RESIDUAL_GAIN  # silu halves what comes in


def tiny_tensors(fields: Fields, seed: int = 0) -> Tensors:
    """Random tensors under their published names; those of an FP8 model are encoded, with their scales after them."""
    tensors: Tensors = {}
    for name, (kind, shape, gain) in tiny_shapes(fields).items():
        weight = _random(_seed(seed, _shared_with(name)), kind, shape, gain)
        if kind == "linear" and "quantization_config" in fields:
            quantised = encode(weight * _block_gains(_seed(seed, name + ".blocks"), shape))
            assert quantised.scale is not None
            tensors[name], tensors[f"{name}_scale_inv"] = quantised.data, quantised.scale
        else:
            tensors[name] = weight if kind == "router_bias" else weight.bfloat16()
    return tensors


def _shared_with(name: str) -> str:
    """The published MTP layer repeats the model's embedding and head."""
    if name.endswith("shared_head.head.weight"):
        return "lm_head.weight"
    return "model.embed_tokens.weight" if name.endswith("embed_tokens.weight") else name


def _seed(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


def _random(rng: torch.Generator, kind: str, shape: tuple[int, ...], gain: float) -> torch.Tensor:
    noise = torch.randn(shape, generator=rng) * gain
    if kind == "norm":
        return 1 + noise
    return noise if kind == "router_bias" else noise / shape[1] ** 0.5


def _block_gains(rng: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """One random factor for each 128x128 block, spread over a matrix of `shape`."""
    rows, columns = shape
    gains = torch.randn(-(-rows // 128), -(-columns // 128), generator=rng).mul(BLOCK_SPREAD).exp()
    return gains.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def write_checkpoint(
    folder: Path, config_overrides: Mapping[str, Any] | None = None, *, seed: int = 0, shards: int = 3
) -> Path:
    """Write config.json and the weights; with several shards a weight and its scale lie in different ones."""
    fields = tiny_config(config_overrides)
    write_files(folder, fields, tiny_tensors(fields, seed), shards)
    return folder


def write_files(folder: Path, fields: Mapping[str, Any], tensors: Tensors, shards: int = 3) -> None:
    """Write any tensors as a checkpoint: one model.safetensors, or `shards` files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {name: shard_name(i % shards, shards) for i, name in enumerate(tensors)}
    for shard in sorted(set(weight_map.values())):
        part = {name: tensors[name] for name, file in weight_map.items() if file == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def shard_name(number: int, shards: int) -> str:
    """Published file name of shard `number`, counted from 0."""
    return f"model-{number + 1:05d}-of-{shards:05d}.safetensors"

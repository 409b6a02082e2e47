"""What a GGUF file says of a model beside its tensors: config.json under llama.cpp's names."""

from quant.config import ModelConfig, YarnConfig
from quant.errors import ConfigError
from quant.export.gguf_file import Value
from quant.export.gguf_tensors import DEFAULT_RECIPE, RECIPES, GgufRecipe

ARCHITECTURE = "deepseek2"
SIGMOID = 2  # of the gating functions
QUANTIZATION_VERSION = 2
YARN_LOG_FACTOR = 0.1  # llama.cpp keeps mscale_all_dim times this
LARGEST_FLOAT32 = 3.4e38
LITE_LAYERS = (26, 27)  # llama.cpp takes models of as many layers for ones without a low rank of queries


def check_exportable(config: ModelConfig) -> None:
    """Raise ConfigError for what the architecture allows and llama.cpp cannot express."""
    if config.yarn is not None and config.yarn.mscale != config.yarn.mscale_all_dim:
        raise ConfigError(
            f"rope_scaling has mscale {config.yarn.mscale} and mscale_all_dim {config.yarn.mscale_all_dim}, and GGUF "
            "holds one number for both; such a model can be exported with --to compressed-tensors only"
        )
    told = model_fields(config, "", RECIPES[DEFAULT_RECIPE]).values()
    if (largest := max(value for value in told if isinstance(value, float))) > LARGEST_FLOAT32:
        raise ConfigError(
            f"config.json holds the number {largest:g}, and a GGUF file none beyond float32; download config.json again"
        )
    if config.q_lora_rank and config.n_layers in LITE_LAYERS:
        raise ConfigError(
            f"llama.cpp takes a model of {config.n_layers} layers for one whose queries have a single matrix, and "
            f"q_lora_rank is {config.q_lora_rank} here; export it with --to compressed-tensors"
        )


def model_fields(config: ModelConfig, name: str, recipe: GgufRecipe) -> dict[str, Value]:
    """All but the tokenizer's. name: what the model is called."""
    fields: dict[str, Value] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": recipe.number,
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    told = {**_shape_fields(config), **_attention_fields(config), **_expert_fields(config), **_rope_fields(config)}
    return fields | {f"{ARCHITECTURE}.{key}": value for key, value in told.items()}


def _shape_fields(config: ModelConfig) -> dict[str, Value]:
    return {
        "block_count": config.n_layers,
        "context_length": config.max_seq_len,
        "embedding_length": config.dim,
        "feed_forward_length": config.inter_dim,
        "vocab_size": config.vocab_size,
        "leading_dense_block_count": config.n_dense_layers,
    }


def _attention_fields(config: ModelConfig) -> dict[str, Value]:
    """Its cache holds latents, which all heads share: one head of keys, as wide as a latent and its rope."""
    return {
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.latent_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
    }


def _expert_fields(config: ModelConfig) -> dict[str, Value]:
    fields: dict[str, Value] = {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.n_activated_experts,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_inter_dim,
        "expert_weights_scale": config.route_scale,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": SIGMOID,
    }
    if config.n_limited_groups < config.n_expert_groups:  # else every group is used
        fields["expert_group_count"] = config.n_expert_groups
        fields["expert_group_used_count"] = config.n_limited_groups
    return fields


def _rope_fields(config: ModelConfig) -> dict[str, Value]:
    fields: dict[str, Value] = {
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": config.rope_theta,
    }
    return fields if config.yarn is None else fields | _yarn_fields(config.yarn)


def _yarn_fields(yarn: YarnConfig) -> dict[str, Value]:
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": yarn.factor,
        "rope.scaling.original_context_length": yarn.original_seq_len,
        "rope.scaling.yarn_beta_fast": yarn.beta_fast,
        "rope.scaling.yarn_beta_slow": yarn.beta_slow,
        "rope.scaling.yarn_log_multiplier": YARN_LOG_FACTOR * yarn.mscale_all_dim,
    }

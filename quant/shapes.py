"""Shapes of the published models, by their Hub ids: enough to plan for a model that is not on this machine.

Source: each model's config.json on the Hub.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quant.config import FIXED_VALUES, SUPPORTED_MODEL_TYPES, ModelConfig, parse_config

Fields = dict[str, Any]

YARN: Fields = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FP8: Fields = {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
}
V3: Fields = FP8 | {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "num_nextn_predict_layers": 1,
}
KIMI_K2: Fields = V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50000,
    "rope_scaling": YARN | {"factor": 32, "beta_fast": 1},
    "num_nextn_predict_layers": 0,
}
V2: Fields = V3 | {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "num_hidden_layers": 60,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "topk_group": 3,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "num_nextn_predict_layers": 0,
    "quantization_config": None,
}
V2_LITE: Fields = V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
MOONLIGHT: Fields = V2_LITE | {
    "model_type": "deepseek_v3",
    "vocab_size": 163840,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "rope_theta": 50000,
    "rope_scaling": None,
}

KNOWN_MODELS: dict[str, Fields] = {
    **dict.fromkeys(
        (
            "deepseek-ai/DeepSeek-R1",
            "deepseek-ai/DeepSeek-R1-0528",
            "deepseek-ai/DeepSeek-R1-Zero",
            "deepseek-ai/DeepSeek-V3",
            "deepseek-ai/DeepSeek-V3-0324",
            "deepseek-ai/DeepSeek-V3-Base",
            "deepseek-ai/DeepSeek-V3.1",
            "deepseek-ai/DeepSeek-V3.1-Base",
        ),
        V3,
    ),
    **dict.fromkeys(("deepseek-ai/DeepSeek-V2", "deepseek-ai/DeepSeek-V2-Chat"), V2),
    **dict.fromkeys(("deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2-Lite-Chat"), V2_LITE),
    **dict.fromkeys(("moonshotai/Moonlight-16B-A3B", "moonshotai/Moonlight-16B-A3B-Instruct"), MOONLIGHT),
    **dict.fromkeys(("moonshotai/Kimi-K2-Base", "moonshotai/Kimi-K2-Instruct"), KIMI_K2),
}

# Model types with the tensors of DeepSeek-V3 (but for the router's bias, a few kB) and another way of using them.
PLANNED_MODEL_TYPES = ("deepseek_v2", "kimi_k2")
PLANNED_ONLY = "planned only: this version does not run this architecture ({model_type})"


@dataclass(frozen=True)
class Shape:
    """A model's config for counting bytes. runs: whether this version can run such a model."""

    config: ModelConfig
    runs: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about it."""
        return () if self.runs else (PLANNED_ONLY.format(model_type=self.config.model_type),)


def known_shape(hub_id: str) -> Shape | None:
    """The shape of a published model; None for one that is not in the table."""
    fields = KNOWN_MODELS.get(hub_id)
    return None if fields is None else shape_of(fields)


def shape_of(fields: Mapping[str, Any]) -> Shape:
    """The shape that a parsed config.json describes. Raises ConfigError for another architecture."""
    model_type = fields.get("model_type")
    if model_type not in PLANNED_MODEL_TYPES:
        return Shape(parse_config(fields), runs=True)
    same_tensors = FIXED_VALUES | {"model_type": SUPPORTED_MODEL_TYPES[0]}
    return Shape(replace(parse_config({**fields, **same_tensors}), model_type=str(model_type)), runs=False)

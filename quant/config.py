"""The shape of a model, read from a checkpoint's config.json.

Field names are those of `ModelArgs` in DeepSeek-V3's inference/model.py. Keys that decide the result
have no default; values this runtime does not implement are refused before a weight is touched.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import ConfigError

SUPPORTED_MODEL_TYPES = ("deepseek_v3",)
# What the architecture fixes; a checkpoint that says otherwise is another architecture.
FIXED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
FP8_VALUES: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


@dataclass(frozen=True)
class YarnConfig:
    """YaRN rope scaling (config.json: `rope_scaling`)."""

    factor: float
    original_seq_len: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a DeepSeek-V3 model but its weights.

    `q_lora_rank` 0 means that queries have one matrix. `fp8` tells whether linear weights are stored as
    E4M3 with 128x128 block scales. `n_mtp_layers` modules for multi-token prediction follow the last layer.
    """

    model_type: str
    vocab_size: int
    dim: int
    inter_dim: int
    n_layers: int
    n_dense_layers: int
    max_seq_len: int
    norm_eps: float
    # mla
    n_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # moe
    moe_inter_dim: int
    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    n_expert_groups: int
    n_limited_groups: int
    norm_topk_prob: bool
    route_scale: float
    # rope and yarn
    rope_theta: float
    yarn: YarnConfig | None
    # the rest
    n_mtp_layers: int
    fp8: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values that the cache holds for a token and a layer: the latent and the shared rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def n_moe_layers(self) -> int:
        return self.n_layers - self.n_dense_layers

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` has routed experts; MTP layers (index n_layers and up) do."""
        return layer >= self.n_dense_layers


def load_config(folder: Path) -> ModelConfig:
    """Read `folder`/config.json. Raises ConfigError if it is missing, damaged or not supported."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} has no config.json, so it is not a model folder; give the folder that holds config.json "
            "and the safetensors files"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); download the file again") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is not a JSON object; download the file again")
    try:
        return parse_config(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a parsed config.json. Raises ConfigError naming the field."""
    model_type = fields.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"model_type is {model_type!r}; this version runs {', '.join(SUPPORTED_MODEL_TYPES)} "
            "(DeepSeek-V3, R1 and models of the same architecture)"
        )
    _refuse_other_values(fields, FIXED_VALUES, "")
    config = ModelConfig(
        model_type=model_type,
        vocab_size=_count(fields, "vocab_size"),
        dim=_count(fields, "hidden_size"),
        inter_dim=_count(fields, "intermediate_size"),
        n_layers=_count(fields, "num_hidden_layers"),
        n_dense_layers=_count(fields, "first_k_dense_replace", least=0),
        max_seq_len=_count(fields, "max_position_embeddings"),
        norm_eps=_number(fields, "rms_norm_eps"),
        n_heads=_count(fields, "num_attention_heads"),
        q_lora_rank=_count(fields, "q_lora_rank") if fields.get("q_lora_rank") is not None else 0,
        kv_lora_rank=_count(fields, "kv_lora_rank"),
        qk_nope_head_dim=_count(fields, "qk_nope_head_dim"),
        qk_rope_head_dim=_count(fields, "qk_rope_head_dim"),
        v_head_dim=_count(fields, "v_head_dim"),
        moe_inter_dim=_count(fields, "moe_intermediate_size"),
        n_routed_experts=_count(fields, "n_routed_experts"),
        n_shared_experts=_count(fields, "n_shared_experts"),
        n_activated_experts=_count(fields, "num_experts_per_tok"),
        n_expert_groups=_count(fields, "n_group"),
        n_limited_groups=_count(fields, "topk_group"),
        norm_topk_prob=_flag(fields, "norm_topk_prob"),
        route_scale=_number(fields, "routed_scaling_factor"),
        rope_theta=_number(fields, "rope_theta"),
        yarn=_parse_yarn(fields.get("rope_scaling")),
        n_mtp_layers=_count(fields, "num_nextn_predict_layers", least=0) if "num_nextn_predict_layers" in fields else 0,
        fp8=_parse_quantization(fields.get("quantization_config")),
        bos_token_id=_token_id(fields, "bos_token_id"),
        eos_token_ids=_token_ids(fields.get("eos_token_id")),
    )
    _check_shapes(config)
    return config


def _require(fields: Mapping[str, Any], key: str) -> Any:
    if key not in fields:
        raise ConfigError(f"{key} is missing; the file is incomplete, download it again")
    return fields[key]


def _count(fields: Mapping[str, Any], key: str, least: int = 1) -> int:
    value = _require(fields, key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise ConfigError(f"{key} is {value!r}; it must be a whole number of at least {least}")
    return value


def _number(fields: Mapping[str, Any], key: str) -> float:
    value = _require(fields, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{key} is {value!r}; it must be a positive number")
    return float(value)


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    value = _require(fields, key)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}; it must be true or false")
    return value


def _token_id(fields: Mapping[str, Any], key: str) -> int | None:
    value = fields.get(key)
    if value is not None and (type(value) is not int or value < 0):
        raise ConfigError(f"{key} is {value!r}; it must be a token id")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f"eos_token_id is {value!r}; it must be a token id or a list of them")
    return tuple(ids)


def _refuse_other_values(fields: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    for key, value in expected.items():
        if fields.get(key, value) != value:
            raise ConfigError(f"{where}{key} is {fields[key]!r}; this version supports only {value!r}")


def _parse_yarn(scaling: Any) -> YarnConfig | None:
    if scaling is None:
        return None
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else scaling
    if kind != "yarn":
        raise ConfigError(f"rope_scaling has type {kind!r}; this version supports only 'yarn' or none")
    return YarnConfig(
        factor=_number(scaling, "factor"),
        original_seq_len=_count(scaling, "original_max_position_embeddings"),
        beta_fast=_number(scaling, "beta_fast"),
        beta_slow=_number(scaling, "beta_slow"),
        mscale=_number(scaling, "mscale"),
        mscale_all_dim=_number(scaling, "mscale_all_dim"),
    )


def _parse_quantization(quantization: Any) -> bool:
    if quantization is None:
        return False
    if not isinstance(quantization, dict) or "quant_method" not in quantization:
        raise ConfigError("quantization_config has no quant_method; the file is incomplete, download it again")
    _refuse_other_values(quantization, FP8_VALUES, "quantization_config.")
    for key in FP8_VALUES:
        _require(quantization, key)
    return True


def _check_shapes(config: ModelConfig) -> None:
    """Refuse counts that contradict each other, so that no later step has to."""
    per_group, rest = divmod(config.n_routed_experts, config.n_expert_groups)
    if rest or per_group < 2 and config.n_expert_groups > 1:
        raise ConfigError(
            f"{config.n_routed_experts} routed experts cannot form n_group={config.n_expert_groups} groups"
        )
    if config.n_limited_groups > config.n_expert_groups:
        raise ConfigError(f"topk_group={config.n_limited_groups} is more than n_group={config.n_expert_groups}")
    if config.n_activated_experts > per_group * config.n_limited_groups:
        raise ConfigError(
            f"num_experts_per_tok={config.n_activated_experts} is more than the experts of topk_group groups"
        )
    if config.n_dense_layers > config.n_layers:
        raise ConfigError(
            f"first_k_dense_replace={config.n_dense_layers} is more than num_hidden_layers={config.n_layers}"
        )
    if config.qk_rope_head_dim % 2:
        raise ConfigError(f"qk_rope_head_dim={config.qk_rope_head_dim} is odd; rope rotates pairs")

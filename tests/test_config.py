import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.config import ModelConfig, YarnConfig, load_config, parse_config
from quant.errors import ConfigError
from tests.tiny_checkpoint import BF16, NO_MTP, NO_Q_LORA, R1, TINY, tiny_config

FP8 = TINY["quantization_config"]
REQUIRED = sorted(
    TINY.keys()
    - {"architectures", "attention_bias", "bos_token_id", "eos_token_id", "hidden_act", "moe_layer_freq"}
    - {"num_key_value_heads", "num_nextn_predict_layers", "q_lora_rank", "quantization_config", "rope_scaling"}
    - {"scoring_func", "tie_word_embeddings", "topk_method", "torch_dtype"}
)


def refuse(overrides: dict[str, Any], *words: str) -> None:
    """Require a ConfigError of one line that says all of `words`."""
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny_config(overrides))
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_r1_reads_as_published() -> None:
    config = parse_config(tiny_config(R1))
    assert (config.dim, config.n_layers, config.n_dense_layers, config.n_moe_layers) == (7168, 61, 3, 58)
    assert (config.n_routed_experts, config.n_activated_experts, config.n_shared_experts) == (256, 8, 1)
    assert (config.qk_head_dim, config.latent_dim, config.v_head_dim) == (192, 576, 128)
    assert (config.n_expert_groups, config.n_limited_groups, config.route_scale) == (8, 4, 2.5)
    assert config.yarn == YarnConfig(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert config.fp8 and config.n_mtp_layers == 1 and config.eos_token_ids == (1,)
    assert not config.is_moe(2) and config.is_moe(3) and config.is_moe(61)


def test_relatives_read_as_published() -> None:
    config = parse_config(tiny_config(BF16 | NO_Q_LORA | NO_MTP | {"rope_scaling": None, "eos_token_id": [1, 5]}))
    assert not config.fp8 and config.q_lora_rank == 0 and config.n_mtp_layers == 0
    assert config.yarn is None and config.eos_token_ids == (1, 5)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "llama", "qwen2", "", None, 3])
def test_other_architectures_are_refused(model_type: Any) -> None:
    refuse({"model_type": model_type}, "model_type", repr(model_type), "deepseek_v3")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ("quant_method", "'gptq'", "'fp8'")),
        ({"quant_method": "awq"}, ("quant_method", "'awq'")),
        ({"quant_method": "compressed-tensors"}, ("quant_method", "'compressed-tensors'")),
        ({**FP8, "weight_block_size": [64, 64]}, ("weight_block_size", "[64, 64]", "[128, 128]")),
        ({**FP8, "weight_block_size": None}, ("weight_block_size",)),
        ({**FP8, "fmt": "e5m2"}, ("fmt", "'e5m2'", "'e4m3'")),
        ({"quant_method": "fp8"}, ("is missing",)),
        ({}, ("quant_method",)),
        ("fp8", ("quant_method",)),
    ],
)
def test_other_quantisation_is_refused(quantization: Any, words: tuple[str, ...]) -> None:
    refuse({"quantization_config": quantization}, *words)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("hidden_act", "gelu"),
        ("moe_layer_freq", 2),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
    ],
)
def test_what_the_architecture_fixes_cannot_differ(field: str, value: Any) -> None:
    refuse({field: value}, field, repr(value), "supports only")


@pytest.mark.parametrize("field", REQUIRED)
def test_what_decides_the_result_has_no_default(field: str) -> None:
    refuse({field: None}, field)


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.5, "256", True, [256]])
def test_counts_are_whole_positive_numbers(value: Any) -> None:
    refuse({"hidden_size": value}, "hidden_size", repr(value))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1e-6", True, 10**400])
def test_factors_are_positive_numbers(value: Any) -> None:
    refuse({"rms_norm_eps": value}, "rms_norm_eps")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"n_routed_experts": 15}, ("15", "n_group=4")),
        ({"n_routed_experts": 4}, ("n_group=4",)),
        ({"topk_group": 5}, ("topk_group=5", "n_group=4")),
        ({"num_experts_per_tok": 9}, ("num_experts_per_tok=9",)),
        ({"first_k_dense_replace": 4}, ("first_k_dense_replace=4", "num_hidden_layers=3")),
        ({"qk_rope_head_dim": 15}, ("qk_rope_head_dim=15",)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ("rope_scaling", "'linear'")),
        ({"rope_scaling": "yarn2"}, ("rope_scaling", "'yarn2'")),
        ({"rope_scaling": {"type": "yarn"}}, ("factor",)),
        ({"norm_topk_prob": 1}, ("norm_topk_prob",)),
        ({"eos_token_id": "stop"}, ("eos_token_id",)),
        ({"bos_token_id": [0]}, ("bos_token_id",)),
    ],
)
def test_contradictions_are_refused(overrides: dict[str, Any], words: tuple[str, ...]) -> None:
    refuse(overrides, *words)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(field=st.sampled_from(sorted(TINY)), value=JSON, inside=st.sampled_from(["", *FP8, *TINY["rope_scaling"]]))
def test_any_value_of_any_field_is_read_or_refused(field: str, value: Any, inside: str) -> None:
    if isinstance(TINY[field], dict) and inside:
        value = {**TINY[field], inside: value}
    try:
        config = parse_config({**TINY, field: value})
    except ConfigError as error:
        assert str(error)
    else:
        assert isinstance(config, ModelConfig)
        assert replace(config, dim=1) != config or config.dim == 1
        hash(config)  # the inventory is cached by it


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("download",)),
        (b'{"model_type": ', ("download",)),
        (b"[]", ("not a JSON object", "download")),
        (b"\xff\xfe", ("download",)),
        (b"[" * 100_000, ("download",)),
        (json.dumps(TINY | {"model_type": "llama"}).encode(), ("'llama'",)),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert all(word in str(caught.value) for word in (str(tmp_path / "config.json"), *words))


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a model folder"):
        load_config(tmp_path)

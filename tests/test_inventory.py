import subprocess
import sys
import time

import pytest

from quant.config import ModelConfig, parse_config
from quant.errors import CheckpointError, ConfigError
from quant.inventory import Inventory, cache_bytes
from quant.names import NAMES, OURS, our_name, published_name
from tests.tiny_checkpoint import BF16, NO_MTP, NO_Q_LORA, R1, RAGGED, tiny_config, tiny_shapes

VARIANTS = {"fp8": {}, "ragged": RAGGED, "bf16": BF16, "no q_lora": NO_Q_LORA, "no mtp": NO_MTP | BF16}


@pytest.fixture(scope="module")
def r1() -> ModelConfig:
    return parse_config(tiny_config(R1))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_names_and_shapes_are_those_of_the_published_form(variant: dict) -> None:
    fields = tiny_config(variant)
    inventory = Inventory.of(parse_config(fields))
    expected = {name: shape for name, (_, shape, _) in tiny_shapes(fields).items()}
    assert {spec.source: spec.shape for spec in inventory.tensors} == expected
    assert len(inventory.by_name) == len(inventory.by_source) == len(inventory.tensors)


def test_one_tensor_of_each_kind(r1: ModelConfig) -> None:
    by_name = Inventory.of(r1).by_name
    expert = by_name["layers.60.ffn.experts.255.w2"]
    assert expert.source == "model.layers.60.mlp.experts.255.down_proj.weight"
    assert (expert.component, expert.layer, expert.expert) == ("routed_expert", 60, 255)
    assert expert.shape == (7168, 2048) and expert.representations == ("fp8_block", "bf16")
    assert by_name["layers.0.ffn.w1"].component == "dense"
    assert by_name["layers.5.attn.wkv_a"].shape == (576, 7168)
    assert by_name["layers.5.attn.wkv_b"].shape == (128 * 256, 512)
    assert by_name["layers.5.attn.q_norm"].component == "norm"
    assert by_name["layers.5.ffn.gate.bias"].source == "model.layers.5.mlp.gate.e_score_correction_bias"
    assert by_name["layers.61.shared_head.head"].component == "mtp"
    assert by_name["layers.61.eh_proj"].shape == (7168, 14336)
    assert by_name["embed"].layer is None and by_name["embed"].representations == ("bf16", "f32")


def test_r1_has_the_published_numbers_of_parameters(r1: ModelConfig) -> None:
    inventory = Inventory.of(r1)
    billions = {component: inventory.parameters(component) / 1e9 for component in inventory.by_component}
    assert billions["routed_expert"] == pytest.approx(653.9, abs=0.05)
    assert billions["attention"] == pytest.approx(11.4, abs=0.05)
    assert billions["shared_expert"] + billions["dense"] == pytest.approx(3.7, abs=0.05)
    assert billions["embed"] == billions["head"] == pytest.approx(0.93, abs=0.005)
    assert billions["router"] + billions["norm"] == pytest.approx(0.11, abs=0.005)
    assert billions["mtp"] == 0
    assert sum(billions.values()) == pytest.approx(671, abs=0.1)
    # README_WEIGHTS.md counts 11.5 B in the MTP module: its block, without eh_proj, embedding and head.
    block = [spec for spec in inventory.by_layer[61] if spec.component != "mtp"]
    assert sum(spec.parameters for spec in block) / 1e9 == pytest.approx(11.5, abs=0.05)
    assert inventory.layer_parameters(61) / 1e9 == pytest.approx(11.507 + 2 * 0.927 + 0.103, abs=0.002)


def test_groups_hold_every_tensor_once(r1: ModelConfig) -> None:
    inventory = Inventory.of(r1)
    assert sum(map(len, inventory.by_layer.values())) == sum(map(len, inventory.by_component.values())) == 46183
    assert [spec.name for spec in inventory.by_layer[None]] == ["embed", "norm", "head"]
    assert list(inventory.mtp_layers) == [61]
    assert {spec.layer for spec in inventory.by_component["mtp"]} == {61}


def test_the_latent_cache_of_r1(r1: ModelConfig) -> None:
    assert cache_bytes(r1, 1, "bfloat16") / 2**10 == pytest.approx(68.6, abs=0.05)
    assert cache_bytes(r1, 131072, "bfloat16") / 2**30 == pytest.approx(8.6, abs=0.05)
    assert cache_bytes(r1, 131072, "int8") / 2**30 == pytest.approx(4.9, abs=0.05)


def test_r1_takes_less_than_a_second(r1: ModelConfig) -> None:
    start = time.perf_counter()
    inventory = Inventory.of(parse_config(tiny_config(R1 | {"vocab_size": 129281})))
    assert len(inventory.by_name) == len(inventory.by_source) == 46183
    assert time.perf_counter() - start < 3  # 0.3 s when nothing else runs
    assert Inventory.of(r1) is Inventory.of(parse_config(tiny_config(R1)))


def test_light_commands_do_not_import_torch_for_it() -> None:
    code = "import sys, quant.inventory; assert not {'torch', 'numba'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_absurd_counts_are_refused_before_memory_is_spent() -> None:
    for field in ("num_hidden_layers", "num_nextn_predict_layers"):
        with pytest.raises(ConfigError, match=field):
            Inventory.of(parse_config(tiny_config({field: 2**31 - 1})))
    with pytest.raises(ConfigError, match="n_routed_experts=1073741824"):
        Inventory.of(parse_config(tiny_config({"n_routed_experts": 2**30})))


def test_names_translate_both_ways() -> None:
    assert len(OURS) == len(NAMES)
    inventory = Inventory.of(parse_config(tiny_config()))
    for spec in inventory.tensors:
        assert published_name(spec.name) == spec.source and our_name(spec.source) == spec.name
    assert our_name("model.layers.12.mlp.experts.34.up_proj.weight") == "layers.12.ffn.experts.34.w3"


@pytest.mark.parametrize(
    "name",
    ["", "model.layers.#.mlp.gate.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.01.enorm.weight"],
)
def test_unknown_names_are_rejected(name: str) -> None:
    with pytest.raises(CheckpointError, match="not part of the DeepSeek-V3 architecture"):
        our_name(name)

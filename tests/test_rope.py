"""Rotary positions and the softmax scale: R1's numbers by hand, and any numbers against transformers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_rt.rope import Angles, Rope, angle_gain, inverse_frequencies, rotate, softmax_scale
from quant.config import ModelConfig, parse_config
from tests.tiny_checkpoint import R1, tiny_config

YARN = R1["rope_scaling"]  # factor 40, original context 4096, beta 32 and 1, both mscales 1
MSCALE = 0.1 * math.log(40) + 1  # 1.36889


@pytest.fixture(scope="module")
def r1() -> ModelConfig:
    return parse_config(tiny_config(R1))


def with_yarn(**changes: float) -> ModelConfig:
    return parse_config(tiny_config(R1 | {"rope_scaling": YARN | changes}))


def test_frequencies_of_r1(r1: ModelConfig) -> None:
    """A pair turns 32 times in 4096 tokens at 10.5 of 32, and once at 22.5: so pair 10 is kept, 23 divided by 40."""
    frequencies = inverse_frequencies(r1)
    assert frequencies.shape == (32,) and frequencies.dtype == torch.float32
    plain = [10000 ** (-pair / 32) for pair in range(32)]
    assert frequencies[:11].tolist() == pytest.approx(plain[:11], rel=1e-6)
    assert frequencies[23:].tolist() == pytest.approx([value / 40 for value in plain[23:]], rel=1e-6)
    # Pair 16: 6 of the 13 steps from 10 to 23.
    assert frequencies[16].item() == pytest.approx(0.01 * (7 / 13 + 6 / 13 / 40), rel=1e-6)
    assert frequencies[16].item() == pytest.approx(0.0055, rel=1e-6)


def test_frequencies_of_an_original_context_too_short_for_one_turn() -> None:
    """As published: the ramp's end comes before its beginning, and nothing is divided."""
    config = with_yarn(original_max_position_embeddings=16, beta_slow=4)
    assert inverse_frequencies(config).tolist() == pytest.approx([10000 ** (-pair / 32) for pair in range(32)])


def test_frequencies_without_yarn() -> None:
    config = parse_config(tiny_config({"rope_scaling": None, "qk_rope_head_dim": 4}))
    assert inverse_frequencies(config).tolist() == pytest.approx([1.0, 0.01])


def test_softmax_scale_of_r1(r1: ModelConfig) -> None:
    assert softmax_scale(r1) == pytest.approx(MSCALE**2 / math.sqrt(192))
    assert softmax_scale(r1) == pytest.approx(0.1352337, rel=1e-5)
    assert angle_gain(r1) == 1


def test_softmax_scale_with_other_numbers() -> None:
    assert softmax_scale(parse_config(tiny_config(R1 | {"rope_scaling": None}))) == pytest.approx(192**-0.5)
    half = with_yarn(mscale=0.707, mscale_all_dim=0.707)
    assert softmax_scale(half) == pytest.approx((0.0707 * math.log(40) + 1) ** 2 * 192**-0.5)
    assert angle_gain(half) == 1
    assert angle_gain(with_yarn(mscale_all_dim=0.5)) == pytest.approx(MSCALE / (0.05 * math.log(40) + 1))
    assert softmax_scale(with_yarn(factor=1)) == pytest.approx(192**-0.5)


def test_angles_of_r1(r1: ModelConfig) -> None:
    angles = Rope(r1)(torch.tensor([0, 1, 100, 163839]))
    assert angles.cos.shape == angles.sin.shape == (4, 32)
    assert angles.cos[0].tolist() == [1.0] * 32 and angles.sin[0].tolist() == [0.0] * 32
    assert angles.sin[1, 0].item() == pytest.approx(math.sin(1.0))
    assert angles.cos[2, 16].item() == pytest.approx(math.cos(0.55), abs=1e-6)
    assert angles.sin[3, 31].item() == pytest.approx(math.sin(163839 * 10000 ** (-31 / 32) / 40), abs=1e-6)


def test_pairs_are_neighbours_and_turn_in_place() -> None:
    quarter, none = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])  # pair 0 by 90 degrees, pair 1 by none
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert rotate(x, Angles(quarter, none)).tolist() == [[-2.0, 1.0, 3.0, 4.0]]
    heads = rotate(torch.stack([x, 2 * x], dim=1), Angles(quarter, none))
    assert heads.tolist() == [[[-2.0, 1.0, 3.0, 4.0], [-4.0, 2.0, 6.0, 8.0]]]
    assert rotate(x.bfloat16(), Angles(quarter, none)).dtype == torch.bfloat16


@settings(max_examples=50, deadline=None)
@given(first=st.integers(0, 4000), second=st.integers(0, 4000), shift=st.integers(0, 100_000))
def test_scores_depend_on_the_distance_only(first: int, second: int, shift: int) -> None:
    rope = Rope(parse_config(tiny_config(R1)))
    q, k = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))

    def score(q_at: int, k_at: int) -> float:
        turned = [rotate(x, rope(torch.tensor([at]))) for x, at in ((q, q_at), (k, k_at))]
        return (turned[0] @ turned[1].T).item()

    # Angles of up to 1e5 radians are held to 4e-3 in float32.
    assert score(first + shift, second + shift) == pytest.approx(score(first, second), abs=0.05)


def transformers_config(config: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    published = {key: value for key, value in config.items() if key != "quantization_config"}
    return transformers.DeepseekV3Config(**published, attn_implementation="eager")


@settings(max_examples=40, deadline=None)
@given(
    yarn=st.fixed_dictionaries(
        {
            "type": st.just("yarn"),
            "factor": st.sampled_from([1.0, 1.5, 4, 8, 40, 64]),
            "original_max_position_embeddings": st.sampled_from([16, 128, 4096, 8192]),
            "beta_fast": st.sampled_from([8, 32, 100]),
            "beta_slow": st.sampled_from([0.5, 1, 4]),
            "mscale": st.sampled_from([0.5, 0.707, 1.0]),
            "mscale_all_dim": st.sampled_from([0.5, 0.707, 1.0]),
        }
    ),
    theta=st.sampled_from([1e3, 1e4, 5e5]),
    width=st.sampled_from([2, 8, 16, 64, 128]),
)
def test_transformers_has_the_same_angles_and_scale(yarn: dict[str, Any], theta: float, width: int) -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = tiny_config({"rope_scaling": dict(yarn), "rope_theta": theta, "qk_rope_head_dim": width})
    ours, theirs = parse_config(config), transformers_config(config)
    rotary = modeling.DeepseekV3RotaryEmbedding(theirs)
    torch.testing.assert_close(inverse_frequencies(ours), rotary.inv_freq, rtol=1e-5, atol=0)
    assert angle_gain(ours) == pytest.approx(rotary.attention_scaling)
    assert softmax_scale(ours) == pytest.approx(modeling.DeepseekV3Attention(theirs, 0).scaling)
    positions = torch.tensor([0, 1, 7, 1000])
    cos, sin = rotary(torch.zeros(1), positions[None])
    angles = Rope(ours)(positions)
    torch.testing.assert_close(angles.cos, cos[0, :, : width // 2], rtol=0, atol=1e-3)
    torch.testing.assert_close(angles.sin, sin[0, :, : width // 2], rtol=0, atol=1e-3)


def test_transformers_without_yarn() -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = tiny_config({"rope_scaling": None})
    ours, theirs = parse_config(config), transformers_config(config)
    torch.testing.assert_close(inverse_frequencies(ours), modeling.DeepseekV3RotaryEmbedding(theirs).inv_freq)
    assert softmax_scale(ours) == pytest.approx(modeling.DeepseekV3Attention(theirs, 0).scaling)

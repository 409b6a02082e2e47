"""Recipes: what they give each tensor, what R1 takes with them, and what is refused."""

from pathlib import Path

import pytest

from quant.config import parse_config
from quant.errors import StoreError
from quant.inventory import Inventory
from quant.packed import ACCURATE, FAST, Q8
from quant.recipes import RECIPES, find_recipe, read_recipe
from quant.shapes import known_shape
from quant.store_formats import ExpertFormats, StoreFormats, representations
from tests.tiny_checkpoint import tiny_config

R1 = known_shape("deepseek-ai/DeepSeek-R1")
LINEARS = "".join(f'{kind} = ["q8"]\n' for kind in ("attention", "kv_b", "dense", "shared_experts", "head"))
LINEARS += 'mtp = ["q8", "fast"]\n'
PLAIN = f'[experts]\ngate_up = "fast"\ndown = "accurate"\n[linears]\n{LINEARS}'


def bits_per_weight(formats: StoreFormats) -> float:
    """Mean over the routed experts, which are equally large."""
    layers = formats.experts.values()
    return sum(2 * one.gate_up.bits_per_weight + one.down.bits_per_weight for one in layers) / (3 * len(layers))


@pytest.mark.parametrize(("recipe", "bits"), [("fast", 4.25), ("balanced", 4.5), ("accurate", 4.627), ("q8", 8.25)])
def test_bits_of_r1_s_experts(recipe: str, bits: float) -> None:
    assert R1 is not None
    formats = RECIPES[recipe].of(R1.config)
    assert formats.experts.keys() == set(range(3, 62))
    assert bits_per_weight(formats) == pytest.approx(bits, abs=1e-3)
    assert recipe == "q8" or bits_per_weight(formats) <= 4.65


def test_accurate_keeps_down_at_8_bits_where_the_model_begins() -> None:
    assert R1 is not None
    experts = find_recipe("accurate").of(R1.config).experts
    assert {layer for layer, one in experts.items() if one.down == Q8} == {3, 4, 5, 6, 7, 8}
    assert all(one.gate_up == ACCURATE for one in experts.values())


def write(tmp_path: Path, text: str, name: str = "mine.toml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_a_file_s_rules(tmp_path: Path) -> None:
    rules = '[[experts.layers]]\nrange = [2, 9]\ngate_up = "q8"\n[[experts.layers]]\nlast = 0.2\ndown = "q8"\n'
    recipe = find_recipe(write(tmp_path, PLAIN.replace("[linears]", f"{rules}[linears]")))
    inventory = Inventory.of(parse_config(tiny_config({"num_hidden_layers": 4})))
    formats = recipe.of(inventory.config)  # layers 1 to 3 have experts, and so has the MTP layer 4
    assert recipe.name == formats.recipe == "mine"
    assert formats.experts == {
        1: ExpertFormats(FAST, ACCURATE),
        2: ExpertFormats(Q8, ACCURATE),
        3: ExpertFormats(Q8, Q8),
        4: ExpertFormats(FAST, ACCURATE),
    }
    of = {name: representations(spec, formats) for name, spec in inventory.by_name.items()}
    assert of["layers.2.ffn.experts.0.w3"] == ("q8",) and of["layers.2.ffn.experts.0.w2"] == ("accurate",)
    assert of["layers.4.eh_proj"] == ("q8", "fast") and of["layers.4.attn.wo"] == ("q8",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("experts = [", "no TOML"),
        ("", "lacks 'experts'"),
        (f'{PLAIN}extra = ["q8"]', "unknown key 'extra'"),
        (f"note = 1\n{PLAIN}", "unknown key 'note'"),
        (PLAIN.replace('down = "accurate"\n', ""), r"\[experts\] lacks 'down'"),
        (PLAIN.replace('"fast"\ndown', '"q3"\ndown'), "'q3'; the formats are fast, accurate, q8"),
        (PLAIN.replace('["q8", "fast"]', '["fast", "q8"]'), "most bits first"),
        (PLAIN.replace('["q8", "fast"]', '["q8", "q8"]'), "each format once"),
        (PLAIN.replace('["q8", "fast"]', "[]"), "give a list of formats"),
        (PLAIN.replace('["q8", "fast"]', "8"), "give a list of formats"),
        (PLAIN.replace("[linears]", "layers = 3\n[linears]"), "not a list of tables"),
        (PLAIN.replace("[linears]", "layers = [3]\n[linears]"), "not a table"),
        (PLAIN.replace("[linears]", '[[experts.layers]]\ndown = "q8"\n[linears]'), "one of first, last and range"),
        (PLAIN.replace("[linears]", "[[experts.layers]]\nfirst = 0.5\n[linears]"), "and gate_up or down"),
        (PLAIN.replace("[linears]", '[[experts.layers]]\nfirst = 3\ndown = "q8"\n[linears]'), "first is 3; a share"),
        (PLAIN.replace("[linears]", '[[experts.layers]]\nlast = 1.5\ndown = "q8"\n[linears]'), "at most 1.0"),
        (PLAIN.replace("[linears]", '[[experts.layers]]\nrange = [4, 3]\ndown = "q8"\n[linears]'), r"\[4, 3\]"),
        (PLAIN.replace("[linears]", '[[experts.layers]]\nrange = "all"\ndown = "q8"\n[linears]'), "'all'"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        find_recipe(write(tmp_path, text))
    assert "mine.toml" in str(caught.value) and "docs/quality.md" in str(caught.value)


def test_files_that_cannot_be_recipes(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no recipe file"):
        find_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(StoreError, match="the name of a recipe that ships"):
        find_recipe(write(tmp_path, PLAIN, "fast.toml"))
    (tmp_path / "large.toml").write_bytes(bytes(2 << 20))
    with pytest.raises(StoreError, match="larger than any recipe"):
        read_recipe(tmp_path / "large.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match="no TOML"):
        read_recipe(tmp_path / "binary.toml")

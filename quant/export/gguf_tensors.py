"""llama.cpp's tensors of a model, architecture "deepseek2": names, shapes and types, and what of ours they hold."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from quant.config import ModelConfig
from quant.errors import StoreError
from quant.export.block_types import ENCODED, F32, FALLBACK, Q4_0, Q4_K, Q6_K, Q8_0, BlockType, fitting
from quant.export.gguf_file import GgufTensor
from quant.inventory import Inventory, TensorSpec

DEFAULT_RECIPE = "q4_k"
# Ours and llama.cpp's, in a layer and outside; matrices of routed experts are one tensor.
TOP_NAMES = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
LAYER_NAMES = {
    "attn_norm": "attn_norm.weight",
    "attn.wq": "attn_q.weight",
    "attn.wq_a": "attn_q_a.weight",
    "attn.q_norm": "attn_q_a_norm.weight",
    "attn.wq_b": "attn_q_b.weight",
    "attn.wkv_a": "attn_kv_a_mqa.weight",
    "attn.kv_norm": "attn_kv_a_norm.weight",
    "attn.wo": "attn_output.weight",
    "ffn_norm": "ffn_norm.weight",
    "ffn.w1": "ffn_gate.weight",
    "ffn.w2": "ffn_down.weight",
    "ffn.w3": "ffn_up.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.shared_experts.w1": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3": "ffn_up_shexp.weight",
}
EXPERT_NAMES = {"w1": "ffn_gate_exps.weight", "w2": "ffn_down_exps.weight", "w3": "ffn_up_exps.weight"}
KEYS_NAME, VALUES_NAME = "attn_k_b.weight", "attn_v_b.weight"

# keys, values: a head's rows of wkv_b, those of the keys turned, as attention multiplies with them.
Part = Literal["whole", "keys", "values"]


@dataclass(frozen=True)
class GgufRecipe:
    """Types of tensors. number: llama.cpp's, of such a file. down: of w2 in the layers that `_is_delicate` names."""

    name: str
    number: int
    matrices: BlockType
    head: BlockType
    down: BlockType


RECIPES = {
    recipe.name: recipe
    for recipe in (
        GgufRecipe("q4_0", 2, Q4_0, Q6_K, Q4_0),
        GgufRecipe("q4_k", 15, Q4_K, Q6_K, Q6_K),
        GgufRecipe("q8_0", 7, Q8_0, Q8_0, Q8_0),
    )
}


@dataclass(frozen=True)
class ModelTensor(GgufTensor):
    """A tensor of a model. sources: names of our tensors whose values, one after the other, it holds."""

    sources: tuple[str, ...] = ()
    part: Part = "whole"
    layer: int | None = None


def find_recipe(name: str) -> GgufRecipe:
    """The recipe of that name. Raises StoreError for another name."""
    if name not in RECIPES:
        raise StoreError(f"there is no recipe {name!r} for GGUF; give one of {', '.join(RECIPES)}")
    return RECIPES[name]


def block_types(recipe: GgufRecipe) -> tuple[BlockType, ...]:
    """Every type with an encoder that a file of this recipe may hold."""
    wanted = {recipe.matrices, recipe.head, recipe.down}
    return tuple(kind for kind in ENCODED if kind in wanted | {FALLBACK.get(kind) for kind in wanted})


def model_tensors(inventory: Inventory, recipe: GgufRecipe) -> tuple[ModelTensor, ...]:
    """All tensors of the file, in its order. MTP layers are left out, as llama.cpp's own converter does."""
    layers = range(inventory.config.n_layers)
    specs = [*inventory.by_layer[None], *(spec for layer in layers for spec in inventory.by_layer[layer])]
    return tuple(tensor for spec in specs for tensor in _tensors_of(spec, inventory, recipe))


def _tensors_of(spec: TensorSpec, inventory: Inventory, recipe: GgufRecipe) -> Iterator[ModelTensor]:
    layers = inventory.config.n_layers
    if spec.layer is None:
        yield _plain(spec, TOP_NAMES[spec.name], layers, recipe)
        return
    prefix = f"layers.{spec.layer}."
    name = spec.name.removeprefix(prefix)
    if spec.expert is not None:
        if spec.expert == 0:
            yield _experts(spec, inventory, recipe)
    elif name == "attn.wkv_b":
        yield from _key_value(spec, inventory.config, recipe)
    else:
        yield _plain(spec, f"blk.{spec.layer}.{LAYER_NAMES[name]}", layers, recipe)


def _plain(spec: TensorSpec, name: str, layers: int, recipe: GgufRecipe) -> ModelTensor:
    kind = _type(spec, spec.shape, layers, recipe)
    return ModelTensor(name, spec.shape, kind, (spec.name,), "whole", spec.layer)


def _experts(spec: TensorSpec, inventory: Inventory, recipe: GgufRecipe) -> ModelTensor:
    """One matrix of all routed experts of a layer. spec: that of the first expert."""
    start, matrix = spec.name.removesuffix(spec.name.split(".experts.")[1]), spec.name.rpartition(".")[2]
    count = inventory.config.n_routed_experts
    sources = tuple(f"{start}{expert}.{matrix}" for expert in range(count))
    name, kind = f"blk.{spec.layer}.{EXPERT_NAMES[matrix]}", _type(spec, spec.shape, inventory.config.n_layers, recipe)
    return ModelTensor(name, (count, *spec.shape), kind, sources, "whole", spec.layer)


def _key_value(spec: TensorSpec, config: ModelConfig, recipe: GgufRecipe) -> Iterator[ModelTensor]:
    nope, value, rank = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    shapes: tuple[tuple[str, Part, tuple[int, int]], ...] = (
        (KEYS_NAME, "keys", (rank, nope)),
        (VALUES_NAME, "values", (value, rank)),
    )
    for name, part, shape in shapes:
        kind = _type(spec, shape, config.n_layers, recipe)
        yield ModelTensor(f"blk.{spec.layer}.{name}", (config.n_heads, *shape), kind, (spec.name,), part, spec.layer)


def _type(spec: TensorSpec, shape: tuple[int, ...], layers: int, recipe: GgufRecipe) -> BlockType:
    """The type of a matrix of `shape`, or of a vector; norms and routers stay float32."""
    if len(shape) == 1 or spec.component == "router":
        return F32
    wanted = recipe.matrices
    if spec.component == "head":
        wanted = recipe.head
    elif spec.name.endswith(".w2") and spec.layer is not None and _is_delicate(spec.layer, layers):
        wanted = recipe.down
    return fitting(wanted, shape[-1])


def _is_delicate(layer: int, layers: int) -> bool:
    """Whether a layer is of the first or the last eighth, or a third one between: as in llama.cpp's Q4_K_M."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2

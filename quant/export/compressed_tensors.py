"""From a checkpoint or a store to a pack-quantized checkpoint in the convention of compressed-tensors.

Names are the published ones; a quantised matrix X.weight [N, K] is three tensors: X.weight_packed int32 [N, K / 8], the
codes + 8 of eight columns from the lowest bits on; X.weight_scale bfloat16 [N, K / group]; X.weight_shape int64 [2].
A weight is its scale times its code, -8 .. 7. Source: https://github.com/vllm-project/compressed-tensors.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quant.errors import StoreError
from quant.export.block_types import INT4_32, INT4_128, BlockType
from quant.inventory import Component, Inventory, TensorSpec
from quant.safetensors_writer import ITEM_BYTES, PADDING, FilePlan, NewTensor

DEFAULT_RECIPE = "experts"
SHARD_BYTES = 5 * 10**9
METADATA = {"format": "pt"}
WEIGHT = ".weight"
BITS = 4
# What each component's modules are called in `ignore`: several servers fuse matrices, so patterns take the fused names
# in, too. Embedding and norms are no linear layers.
IGNORED: dict[Component, tuple[str, ...]] = {
    "attention": ("re:.*self_attn.*",),
    "shared_expert": ("re:.*shared_experts.*",),
    "dense": (r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",),
    "router": (r"re:.*mlp\.gate$",),
    "head": ("lm_head",),
    "mtp": (r"re:.*eh_proj$", r"re:.*shared_head.*"),
}


@dataclass(frozen=True)
class PackedRecipe:
    """components: those whose matrices are quantised; the others stay bfloat16. group: columns that share a scale."""

    name: str
    components: frozenset[Component]
    type: BlockType

    @property
    def group(self) -> int:
        return self.type.block


RECIPES = {
    recipe.name: recipe
    for recipe in (
        PackedRecipe("experts", frozenset({"routed_expert"}), INT4_32),
        PackedRecipe("linears", frozenset({"routed_expert", "shared_expert", "dense", "attention"}), INT4_128),
    )
}


@dataclass(frozen=True)
class CheckpointTensor(NewTensor):
    """A tensor of a shard. spec: what of the inventory it belongs to."""

    spec: TensorSpec | None = None


def find_recipe(name: str) -> PackedRecipe:
    """The recipe of that name. Raises StoreError for another name."""
    if name not in RECIPES:
        raise StoreError(f"there is no recipe {name!r} for compressed-tensors; give one of {', '.join(RECIPES)}")
    return RECIPES[name]


def is_packed(spec: TensorSpec, recipe: PackedRecipe) -> bool:
    return spec.component in recipe.components and len(spec.shape) == 2


def quantization_config(inventory: Inventory, recipe: PackedRecipe) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    components: Sequence[Component] = tuple(inventory.by_component)
    ignored = [name for part, names in IGNORED.items() if part in components for name in names]
    kept = [name for part in recipe.components for name in IGNORED.get(part, ())]
    weights: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": recipe.group,
        "num_bits": BITS,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [name for name in ignored if name not in kept],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def config_text(published: dict[str, Any], inventory: Inventory, recipe: PackedRecipe) -> bytes:
    """config.json: the published one, with what the weights are now."""
    fields = {**published, "quantization_config": quantization_config(inventory, recipe)}
    fields.pop("dtype", None)
    fields["torch_dtype"] = "bfloat16"
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def plan_shards(inventory: Inventory, recipe: PackedRecipe) -> dict[str, FilePlan[CheckpointTensor]]:
    """The files by name, none above 5 GB unless a single tensor is. Raises StoreError for shapes that do not fit."""
    _check_shapes(inventory, recipe)
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in inventory.tensors:
        nbytes = sum(tensor.nbytes for tensor in _tensors_of(spec, recipe))
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += nbytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return {name: _plan_shard(specs, recipe) for name, specs in zip(names, shards, strict=True)}


def index_text(plans: dict[str, FilePlan[CheckpointTensor]]) -> bytes:
    """model.safetensors.index.json."""
    weight_map = {tensor.name: name for name, plan in plans.items() for tensor in plan.tensors}
    total = sum(tensor.nbytes for plan in plans.values() for tensor in plan.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _check_shapes(inventory: Inventory, recipe: PackedRecipe) -> None:
    for spec in inventory.tensors:
        if is_packed(spec, recipe) and spec.shape[1] % recipe.group:
            raise StoreError(
                f"tensor {spec.source!r} has rows of {spec.shape[1]} weights, which are no whole groups of "
                f"{recipe.group}; give another recipe ({', '.join(RECIPES)}), or --to gguf"
            )


def _plan_shard(specs: Sequence[TensorSpec], recipe: PackedRecipe) -> FilePlan[CheckpointTensor]:
    """Shapes, of 8 bytes each value, come first, so that what follows stays aligned without padding."""
    tensors = [tensor for spec in specs for tensor in _tensors_of(spec, recipe)]
    tensors.sort(key=lambda tensor: tensor.dtype != "I64")
    plan = FilePlan.of(tensors, METADATA)
    if f'"{PADDING}'.encode() in plan.head:
        raise StoreError(
            "this model has a matrix with an odd number of rows and of scales, after which nothing is aligned in a "
            "safetensors file; export it with --to gguf"
        )
    return plan


def _tensors_of(spec: TensorSpec, recipe: PackedRecipe) -> Iterator[CheckpointTensor]:
    """A tensor of the inventory, in the order in which its values become known."""
    if not is_packed(spec, recipe):
        yield _tensor(spec.source, "F32" if spec.name.endswith(".gate.bias") else "BF16", spec.shape, spec)
        return
    rows, columns = spec.shape
    module = spec.source.removesuffix(WEIGHT)
    yield _tensor(f"{module}.weight_shape", "I64", (2,), spec)
    yield _tensor(f"{module}.weight_packed", "I32", (rows, columns * BITS // 32), spec)
    yield _tensor(f"{module}.weight_scale", "BF16", (rows, columns // recipe.group), spec)


def _tensor(name: str, dtype: str, shape: tuple[int, ...], spec: TensorSpec) -> CheckpointTensor:
    return CheckpointTensor(name, dtype, shape, ITEM_BYTES[dtype], spec)

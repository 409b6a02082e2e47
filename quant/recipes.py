"""Recipes: in which formats a store keeps the tensors of a model.

Nothing here needs torch: the planner counts the bytes of a store that is not made yet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod

from quant.errors import StoreError
from quant.inventory import Shape, TensorSpec
from quant.packed import ACCURATE, FAST, PACKED_FORMATS, Q8, PackedFormat

DEFAULT_RECIPE = "accurate"
PLAIN_BYTES = {"bf16": 2, "f32": 4}
FP8_SIDE, FP8_SCALE_BYTES = 128, 4


@dataclass(frozen=True)
class Recipe:
    """experts: the format of routed experts. linears: those of every other matrix, the most exact one first.

    embedding: "bf16" or "f32", as the checkpoint holds it: a row of it is read, never multiplied.
    """

    name: str
    experts: PackedFormat
    linears: tuple[PackedFormat, ...]
    embedding: str = "bf16"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("accurate", ACCURATE, (Q8, ACCURATE)),
        Recipe("fast", FAST, (Q8, FAST)),
        Recipe("q8", Q8, (Q8,)),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises StoreError for another name."""
    if name not in RECIPES:
        raise StoreError(f"there is no recipe {name!r}; give one of {', '.join(RECIPES)}")
    return RECIPES[name]


def representations(spec: TensorSpec, recipe: Recipe) -> tuple[str, ...]:
    """Names of the formats in which a store of `recipe` holds a tensor, the most exact one first."""
    if spec.component == "routed_expert":
        return (recipe.experts.name,)
    if spec.component == "embed" or spec.name.endswith(".embed"):  # an MTP layer has a copy of its own
        return (recipe.embedding,)
    if spec.component in ("norm", "router") or len(spec.shape) == 1:
        return ("f32",)
    return tuple(fmt.name for fmt in recipe.linears)


def stored_bytes(representation: str, shape: Shape) -> int:
    """Bytes of a tensor of `shape` as "bf16", "f32", "fp8_block" (scales included) or in a packed format."""
    return _BYTES_OF[representation](shape)


def _fp8_block_bytes(shape: Shape) -> int:
    return prod(shape) + FP8_SCALE_BYTES * prod(ceil(size / FP8_SIDE) for size in shape)


_BYTES_OF: dict[str, Callable[[Shape], int]] = {
    "bf16": lambda shape: PLAIN_BYTES["bf16"] * prod(shape),
    "f32": lambda shape: PLAIN_BYTES["f32"] * prod(shape),
    "fp8_block": _fp8_block_bytes,
    **{fmt.name: fmt.nbytes for fmt in PACKED_FORMATS.values()},
}

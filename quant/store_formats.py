"""In which formats a store keeps the tensors of one model: a recipe, applied to it.

Nothing here needs torch: the planner counts the bytes of a store that is not made yet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod

from quant.inventory import Shape, TensorSpec
from quant.packed import PACKED_FORMATS, ExpertRecord, PackedFormat

PLAIN_BYTES = {"bf16": 2, "f32": 4}
FP8_SIDE, FP8_SCALE_BYTES = 128, 4
# Kinds of matrices that are no routed experts, each with formats of its own.
LINEARS = ("attention", "kv_b", "dense", "shared_experts", "head", "mtp")
KIND_OF = {"shared_expert": "shared_experts"}  # of the inventory's components; the others are called alike


@dataclass(frozen=True)
class ExpertFormats:
    """The formats of a routed expert. gate_up: of w1 and w3. down: of w2."""

    gate_up: PackedFormat
    down: PackedFormat

    def of(self, name: str) -> PackedFormat:
        """The format of a matrix by its name, which ends in w1, w3 or w2."""
        return self.down if name.endswith(".w2") else self.gate_up

    def record(self, dim: int, inter_dim: int) -> ExpertRecord:
        """Where the matrices lie in a record."""
        return ExpertRecord(self.gate_up, dim, inter_dim, self.down)


@dataclass(frozen=True)
class StoreFormats:
    """recipe: its name. experts: by layer. linears: by kind (LINEARS), the most exact one first.

    embedding: "bf16" or "f32", as the checkpoint holds it: a row of it is read, never multiplied.
    """

    recipe: str
    experts: Mapping[int, ExpertFormats]
    linears: Mapping[str, tuple[PackedFormat, ...]]
    embedding: str = "bf16"

    @property
    def packed(self) -> dict[str, PackedFormat]:
        """All packed formats in use, by name."""
        experts = [fmt for formats in self.experts.values() for fmt in (formats.gate_up, formats.down)]
        used = [*experts, *(fmt for formats in self.linears.values() for fmt in formats)]
        return {fmt.name: fmt for fmt in used}


def representations(spec: TensorSpec, formats: StoreFormats) -> tuple[str, ...]:
    """Names of the formats in which a store holds a tensor, the most exact one first."""
    if spec.component == "routed_expert":
        assert spec.layer is not None
        return (formats.experts[spec.layer].of(spec.name).name,)
    if spec.component == "embed" or spec.name.endswith(".embed"):  # an MTP layer has a copy of its own
        return (formats.embedding,)
    if spec.component in ("norm", "router") or len(spec.shape) == 1:
        return ("f32",)
    return tuple(fmt.name for fmt in formats.linears[linear_kind(spec)])


def linear_kind(spec: TensorSpec) -> str:
    """Which of LINEARS a matrix is, as long as it is no routed expert, router or embedding."""
    return "kv_b" if spec.name.endswith(".wkv_b") else KIND_OF.get(spec.component, spec.component)


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

"""Which tensors a store holds, in which files and in which order: docs/formats.md, section A store.

It follows from the model and the store's formats alone. Writer, reader and planner share it; no tensor is touched.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quant.inventory import Inventory, TensorSpec
from quant.packed import PACKED_FORMATS, RECORD_ALIGNMENT, TENSOR_ALIGNMENT, ExpertRecord
from quant.safetensors_writer import FilePlan, NewTensor
from quant.store_formats import StoreFormats, representations, stored_bytes

STORE_FORMAT = "dsr1-store"
STORE_VERSION = 3
METADATA = {"format": STORE_FORMAT, "version": str(STORE_VERSION)}
TOP_FILE = "top.safetensors"
DTYPE_OF_PLAIN = {"bf16": "BF16", "f32": "F32"}


@dataclass(frozen=True)
class StoreEntry(NewTensor):
    """A tensor of a store's file.

    representation: the name of its format. specs: what of the inventory it holds, one tensor, or, in order, those of
    all routed experts of a layer. record: of each of these experts; None for a single tensor.
    """

    representation: str = ""
    specs: tuple[TensorSpec, ...] = ()
    record: ExpertRecord | None = None

    @property
    def packed(self) -> list[tuple[TensorSpec, str]]:
        """The packed tensors, and the name of the format of each."""
        if self.record is not None:
            down = self.record.down_format.name
            return [(spec, down if spec.name.endswith(".w2") else self.record.format.name) for spec in self.specs]
        return [(spec, self.representation) for spec in self.specs if self.representation in PACKED_FORMATS]


def plan_store(inventory: Inventory, formats: StoreFormats) -> dict[str, FilePlan[StoreEntry]]:
    """The safetensors files of a store, by name, layers first."""
    return {
        layer_file(layer): FilePlan.of(tuple(_stored(inventory, layer, formats)), METADATA)
        for layer in sorted(inventory.by_layer, key=lambda layer: (layer is None, layer))
    }


def layer_file(layer: int | None) -> str:
    """The file of a layer's tensors; None: of those outside of the layers."""
    return TOP_FILE if layer is None else f"layer-{layer:03d}.safetensors"


def experts_name(layer: int) -> str:
    """The entry of a layer's routed experts."""
    return f"layers.{layer}.ffn.experts"


def entry_name(name: str, representation: str) -> str:
    """The entry of a tensor that is not a routed expert."""
    return f"{name}.{representation}" if representation in PACKED_FORMATS else name


def expert_record(inventory: Inventory, formats: StoreFormats, layer: int) -> ExpertRecord:
    """The record of one routed expert of a layer."""
    return formats.experts[layer].record(inventory.config.dim, inventory.config.moe_inter_dim)


def _stored(inventory: Inventory, layer: int | None, formats: StoreFormats) -> Iterator[StoreEntry]:
    specs = inventory.by_layer[layer]
    for spec in specs:
        if spec.expert is None:
            for representation in representations(spec, formats):
                yield _single(spec, representation)
    experts = tuple(spec for spec in specs if spec.expert is not None)
    if layer is not None and experts:
        record = expert_record(inventory, formats, layer)
        shape = (inventory.config.n_routed_experts, record.nbytes)
        yield StoreEntry(experts_name(layer), "U8", shape, RECORD_ALIGNMENT, record.format_name, experts, record=record)


def _single(spec: TensorSpec, representation: str) -> StoreEntry:
    name = entry_name(spec.name, representation)
    if representation in PACKED_FORMATS:
        shape: tuple[int, ...] = (stored_bytes(representation, spec.shape),)
        return StoreEntry(name, "U8", shape, TENSOR_ALIGNMENT, representation, (spec,))
    return StoreEntry(name, DTYPE_OF_PLAIN[representation], spec.shape, TENSOR_ALIGNMENT, representation, (spec,))

"""What is exported: a checkpoint, in a folder or on the Hub, or a store."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quant.checkpoint import Checkpoint
from quant.config import ModelConfig
from quant.convert import Source as ConvertSource
from quant.export.block_types import BlockType
from quant.export.transfer import CODES_OF
from quant.files import sha256_of
from quant.formats import Format
from quant.inventory import Inventory
from quant.manifest import MANIFEST_NAME
from quant.packed import PackedFormat
from quant.pieces import Published
from quant.safetensors_file import FileSpan, SafetensorsFile
from quant.shards import Shards
from quant.store import Store, is_store


class Model(Protocol):
    """A Checkpoint or a Store."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def inventory(self) -> Inventory: ...
    @property
    def shards(self) -> tuple[SafetensorsFile, ...]: ...
    def representations(self, name: str) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Source:
    """A model, what brings its files, and what tells it from all others (in hexadecimal)."""

    model: Checkpoint | Store
    shards: Shards
    fingerprint: str

    @staticmethod
    def of(model: "Checkpoint | Store | Source | ConvertSource") -> "Source":
        """A checkpoint or a store that lies in a folder, or what was found before."""
        if isinstance(model, Source):
            return model
        if isinstance(model, Store):
            return Source(model, Shards(), sha256_of(model.folder / MANIFEST_NAME))
        found = model if isinstance(model, ConvertSource) else ConvertSource.of(model)
        return Source(found.checkpoint, found.shards, found.fingerprint)

    def rows(self, kinds: Mapping[str, BlockType]) -> Published:
        """Where the rows of tensors lie. kinds: of whole matrices, by name, what they become."""
        return StoreRows(self.model, kinds) if isinstance(self.model, Store) else self.model


class StoreRows:
    """A store's tensors (`Published`): in the format whose codes are taken over, or in the most exact one."""

    def __init__(self, store: Store, kinds: Mapping[str, BlockType]) -> None:
        self.folder, self.shards, self._store, self._kinds = store.folder, store.shards, store, kinds

    def place(self, name: str) -> tuple[Format | PackedFormat, FileSpan, None]:
        kind = self._kinds.get(name)
        taken = kind is not None and takes_over(self._store, name, kind)
        representation = CODES_OF[kind].name if kind is not None and taken else self._store.representations(name)[0]
        return *self._store.place(name, representation), None


def takes_over(model: Model, name: str, kind: BlockType) -> bool:
    """Whether `model` holds the matrix `name` in the format whose codes `kind` takes over."""
    fmt = CODES_OF.get(kind)
    return fmt is not None and fmt.name in model.representations(name)


def open_source(folder: Path) -> Source:
    """The checkpoint or store in `folder`. Raises Dsr1Error if it is neither, or damaged."""
    return Source.of(Store.open(folder) if is_store(folder) else Checkpoint.open(folder))

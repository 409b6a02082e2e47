"""A store: what `dsr1 quantize` writes, checked against its manifest and the inventory when it is opened.

Opening reads the manifest and headers only. Weights are views of the mapped files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quant.config import ModelConfig, load_config
from quant.errors import CheckpointError, StoreError
from quant.files import sha256_of
from quant.formats import FORMATS, Format, QuantTensor
from quant.inventory import Inventory, TensorSpec
from quant.journal import is_unfinished
from quant.manifest import MANIFEST_NAME, REMEDY, Manifest, check_layers, read_manifest
from quant.packed import PACKED_FORMATS, ExpertRecord, PackedFormat
from quant.progress import Meter, Progress
from quant.safetensors_file import FileSpan, SafetensorsFile
from quant.safetensors_writer import DATA_ALIGNMENT, PADDING
from quant.store_formats import representations
from quant.store_layout import METADATA, StoreEntry, entry_name, expert_record, experts_name, layer_file, plan_store

CONFIG_NAME = "config.json"


def is_store(folder: Path) -> bool:
    """Whether a folder is a store, be it an unfinished one, and not a published checkpoint."""
    return (folder / MANIFEST_NAME).exists() or is_unfinished(folder)


@dataclass(frozen=True, eq=False)
class Store:
    """A checked folder.

    config: that of config.json, but `n_mtp_layers` is the number that the store holds. inventory: the tensors of
    `config`.
    """

    folder: Path
    config: ModelConfig
    inventory: Inventory
    manifest: Manifest
    _shards: Mapping[str, SafetensorsFile]

    @classmethod
    def open(cls, folder: Path | str) -> "Store":
        """Read manifest, config.json and headers, and compare them with each other and with the folder.

        Raises ConfigError for a model that is not supported, and StoreError, naming file and tensor, for a store
        that is unfinished, damaged, of another version, or holds anything else than it should.
        """
        folder = Path(folder)
        if is_unfinished(folder):
            raise StoreError(
                f"{folder} is a conversion that was not finished; run the same `dsr1 quantize` again to finish it"
            )
        manifest = read_manifest(folder)
        _check_files(folder, manifest)
        config = load_config(folder)
        if manifest.mtp_layers > config.n_mtp_layers:
            raise StoreError(
                f"{folder} holds {manifest.mtp_layers} MTP layers, and its config.json tells of {config.n_mtp_layers}; "
                + REMEDY
            )
        config = replace(config, n_mtp_layers=manifest.mtp_layers)
        check_layers(folder, manifest, config)
        inventory = Inventory.of(config)
        return cls(folder, config, inventory, manifest, _open_shards(folder, inventory, manifest))

    @property
    def recipe(self) -> str:
        """The name of the recipe."""
        return self.manifest.formats.recipe

    def record(self, layer: int) -> ExpertRecord:
        """Where the matrices lie in each row of `expert_records`. Raises KeyError for a layer without experts."""
        return expert_record(self.inventory, self.manifest.formats, layer)

    @property
    def mtp_layers(self) -> range:
        """Indices of the MTP layers that are there."""
        return self.inventory.mtp_layers

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, in all their representations, padding included."""
        return sum(shard.nbytes for shard in self._shards.values())

    def representations(self, name: str) -> tuple[str, ...]:
        """Formats in which a tensor is there, the most exact one first. Raises KeyError for an unknown name."""
        return representations(self.inventory.by_name[name], self.manifest.formats)

    def weight(self, name: str, representation: str | None = None) -> QuantTensor:
        """A tensor as a view of the mapped file, in its most exact representation or the one that is named.

        Raises KeyError for a tensor that the model, or a representation that the store does not have.
        """
        spec = self.inventory.by_name[name]
        stored = self.representations(name)
        if representation is None:
            representation = stored[0]
        if representation not in stored:
            raise KeyError(f"{name} is not stored as {representation}, only as {', '.join(stored)}")
        if spec.expert is not None:
            return self._expert_matrix(spec)
        fmt = PACKED_FORMATS.get(representation) or FORMATS[representation]
        data = self._shards[layer_file(spec.layer)].tensor(entry_name(name, representation))
        return QuantTensor(fmt, spec.shape, data)

    @property
    def shards(self) -> tuple[SafetensorsFile, ...]:
        """The files of tensors."""
        return tuple(self._shards.values())

    def place(self, name: str, representation: str) -> tuple[Format | PackedFormat, FileSpan]:
        """Format of a tensor in one of its representations, and where its bytes lie. Raises KeyError."""
        spec = self.inventory.by_name[name]
        if spec.expert is not None and spec.layer is not None:
            fmt, begin = self._in_record(spec)
            span = self.expert_span(spec.layer)
            begin += span.begin + spec.expert * self.record(spec.layer).nbytes
            return fmt, FileSpan(span.path, begin, fmt.nbytes(spec.shape))
        stored = PACKED_FORMATS.get(representation) or FORMATS[representation]
        return stored, self._shards[layer_file(spec.layer)].span(entry_name(name, representation))

    def expert_records(self, layer: int) -> torch.Tensor:
        """The routed experts of a layer, a mapped view: uint8 [experts, record bytes], each laid out as `record`.

        Raises KeyError for a layer without them.
        """
        return self._expert_shard(layer).tensor(experts_name(layer))

    def expert_span(self, layer: int) -> FileSpan:
        """Where the records of a layer lie in their file. Raises KeyError for a layer without them."""
        return self._expert_shard(layer).span(experts_name(layer))

    def _expert_shard(self, layer: int) -> SafetensorsFile:
        if layer not in self.inventory.by_layer or not self.config.is_moe(layer):
            raise KeyError(f"layer {layer} has no routed experts")
        return self._shards[layer_file(layer)]

    def _expert_matrix(self, spec: TensorSpec) -> QuantTensor:
        assert spec.layer is not None and spec.expert is not None
        fmt, begin = self._in_record(spec)
        data = self.expert_records(spec.layer)[spec.expert, begin : begin + fmt.nbytes(spec.shape)]
        return QuantTensor(fmt, spec.shape, data)

    def _in_record(self, spec: TensorSpec) -> tuple[PackedFormat, int]:
        """Format of a matrix of a routed expert, and where it begins in the expert's record."""
        assert spec.layer is not None
        record, fmt = self.record(spec.layer), self.manifest.formats.experts[spec.layer].of(spec.name)
        return fmt, {"w1": record.w1, "w3": record.w3, "w2": record.w2}[spec.name.rpartition(".")[2]]

    def verify(self, progress: Callable[[Progress], None]) -> None:
        """Read every file and compare its checksum. Raises StoreError naming the files that differ."""
        files = self.manifest.files
        meter = Meter(sum(record.nbytes for record in files.values()), progress)
        changed = [
            name for name, record in files.items() if sha256_of(self.folder / name, meter.of(name)) != record.sha256
        ]
        if changed:
            raise StoreError(f"{self.folder} is damaged: the checksum of {', '.join(changed)} differs; {REMEDY}")


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Require every file of the manifest, config.json among them, with its size, and no other tensors."""
    if CONFIG_NAME not in manifest.files:
        raise StoreError(f"{folder / MANIFEST_NAME} is damaged: it does not list {CONFIG_NAME}; {REMEDY}")
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise StoreError(f"{path} is missing; {REMEDY}")
        if path.stat().st_size != record.nbytes:
            raise StoreError(
                f"{path} has {path.stat().st_size} bytes, and {MANIFEST_NAME} says {record.nbytes}; {REMEDY}"
            )
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in manifest.files:
            raise StoreError(f"{path} is not part of the store, {MANIFEST_NAME} does not list it; move it elsewhere")


def _open_shards(folder: Path, inventory: Inventory, manifest: Manifest) -> dict[str, SafetensorsFile]:
    """The files of tensors, each with exactly the tensors that recipe and model give it."""
    plans = plan_store(inventory, manifest.formats)
    listed = {name for name in manifest.files if name.endswith(".safetensors")}
    if listed != plans.keys():
        [name, *_] = sorted(listed ^ plans.keys())
        problem = "does not list" if name in plans else "lists, against config.json,"
        raise StoreError(f"{folder / MANIFEST_NAME} {problem} {name}; {REMEDY}")
    return {name: _open_shard(folder / name, plan.tensors) for name, plan in plans.items()}


def _open_shard(path: Path, entries: tuple[StoreEntry, ...]) -> SafetensorsFile:
    try:
        shard = SafetensorsFile.open(path)
    except CheckpointError as error:
        reason = str(error).rpartition("; ")[0]  # what follows is a remedy for downloads
        raise StoreError(f"{reason}; {REMEDY}") from None
    if shard.metadata != METADATA or shard.data_start % DATA_ALIGNMENT:
        raise StoreError(f"{path} was not written by `dsr1 quantize`; {REMEDY}")
    for entry in entries:
        _check_entry(shard, entry)
    known = {entry.name for entry in entries}
    foreign = [name for name in shard.names() if name not in known and not name.startswith(PADDING)]
    if foreign:
        raise StoreError(f"{path} holds a tensor {foreign[0]!r} that this model or recipe does not have; {REMEDY}")
    return shard


def _check_entry(shard: SafetensorsFile, entry: StoreEntry) -> None:
    if entry.name not in shard.tensors:
        raise StoreError(f"{shard.path} lacks tensor {entry.name!r}; {REMEDY}")
    stored = shard.spec(entry.name)
    if (stored.dtype, stored.shape) != (entry.dtype, entry.shape):
        raise StoreError(
            f"{shard.path}: tensor {entry.name!r} is {stored.dtype} {stored.shape}, and config.json and the recipe "
            f"ask for {entry.dtype} {entry.shape}; {REMEDY}"
        )
    if (shard.data_start + stored.begin) % entry.alignment:
        raise StoreError(
            f"{shard.path}: tensor {entry.name!r} does not begin at a multiple of {entry.alignment}; {REMEDY}"
        )

"""A published checkpoint: config.json and safetensors files, checked against the inventory when it is opened.

Opening reads headers only. Weights are views of the mapped files.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from quant.config import ModelConfig, load_config
from quant.errors import CheckpointError
from quant.formats import BF16, F32, FP8_BLOCK, Format, QuantTensor
from quant.inventory import Inventory, TensorSpec
from quant.names import IGNORED_SUFFIXES, SCALE_SUFFIX
from quant.safetensors_file import FileSpan, SafetensorsFile, damaged, parse_json_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FORMAT_OF_DTYPE = {"F8_E4M3": FP8_BLOCK, "BF16": BF16, "F32": F32}
DTYPE_OF_FORMAT = {fmt.name: dtype for dtype, fmt in FORMAT_OF_DTYPE.items()}

Where = Mapping[str, SafetensorsFile]
OpenFile = Callable[[Path], SafetensorsFile]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checked folder.

    config: that of config.json, but `n_mtp_layers` is the number whose tensors are there: many conversions leave
    MTP layers out. inventory: the tensors of `config`. shards: the files, in the order of their names.
    """

    folder: Path
    config: ModelConfig
    inventory: Inventory
    shards: tuple[SafetensorsFile, ...]
    _where: Where

    @classmethod
    def open(cls, folder: Path | str, open_file: OpenFile | None = None) -> "Checkpoint":
        """Read config.json, the index and all headers, and compare them with the inventory.

        open_file: reads the headers of files that are not in the folder. Raises ConfigError for a model or quantisation
        that is not supported, and CheckpointError, naming file and tensor, for missing, damaged, contradicting or
        unknown content.
        """
        folder = Path(folder)
        config = load_config(folder)
        shards, where = _open_shards(folder, open_file)
        config = replace(config, n_mtp_layers=_present_mtp_layers(config, where))
        inventory = Inventory.of(config)
        _check_tensors(inventory, where, folder)
        return cls(folder, config, inventory, shards, where)

    @property
    def mtp_layers(self) -> range:
        """Indices of the MTP layers whose tensors are there."""
        return self.inventory.mtp_layers

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, scales included."""
        return sum(shard.nbytes for shard in self.shards)

    def representations(self, name: str) -> tuple[str]:
        """The one format in which a tensor is there. Raises KeyError for a name without a tensor."""
        source = self.inventory.by_name[name].source
        return (FORMAT_OF_DTYPE[self._where[source].spec(source).dtype].name,)

    def place(self, name: str) -> tuple[Format, FileSpan, FileSpan | None]:
        """Format of a tensor, where its bytes lie, and where its scales do, if it has any. Raises KeyError."""
        source = self.inventory.by_name[name].source
        shard = self._where[source]
        fmt = FORMAT_OF_DTYPE[shard.spec(source).dtype]
        if fmt.block is None:
            return fmt, shard.span(source), None
        scale = source + SCALE_SUFFIX
        return fmt, shard.span(source), self._where[scale].span(scale)

    def weight(self, name: str, representation: str | None = None) -> QuantTensor:
        """The tensor of our `name`, as a view of the mapped file.

        Raises KeyError for a name without a tensor, or for another `representation` than the one that is there.
        """
        if representation is not None and representation not in self.representations(name):
            raise KeyError(f"{name} is not stored as {representation}")
        spec = self.inventory.by_name[name]
        shard = self._where[spec.source]
        fmt = FORMAT_OF_DTYPE[shard.spec(spec.source).dtype]
        scale = None
        if fmt.block is not None:
            scale_name = spec.source + SCALE_SUFFIX
            scale = self._where[scale_name].tensor(scale_name)
        return QuantTensor(fmt, spec.shape, shard.tensor(spec.source), scale)


def shard_names(folder: Path) -> list[str]:
    """Names of the safetensors files that a checkpoint consists of, in order; one if there is no index."""
    index = folder / INDEX_NAME
    return sorted(set(_read_index(index).values())) if index.exists() else [SINGLE_NAME]


def _open_shards(folder: Path, open_file: OpenFile | None) -> tuple[tuple[SafetensorsFile, ...], Where]:
    """All files of a checkpoint, and the file of each tensor."""
    index = folder / INDEX_NAME
    if index.exists():
        return _open_indexed(folder, _read_index(index), open_file)
    if open_file is None and not (folder / SINGLE_NAME).exists():
        raise CheckpointError(f"{folder} has neither {INDEX_NAME} nor {SINGLE_NAME}; download the model's weights")
    single = (open_file or SafetensorsFile.open)(folder / SINGLE_NAME)
    return (single,), dict.fromkeys(single.names(), single)


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map: tensor -> file name inside the folder."""
    try:
        weight_map = parse_json_object(path.read_bytes()).get("weight_map")
    except (OSError, ValueError) as error:
        raise damaged(path, f"it cannot be read ({error})") from None
    if not isinstance(weight_map, dict):
        raise damaged(path, "it has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise damaged(path, f"tensor {name!r} is said to be in {file!r}, which is not a file of this folder")
    return weight_map


def _is_inside(file: str) -> bool:
    """Whether a file name of the index stays in the folder. Links inside the folder are the user's own affair."""
    parts = PurePosixPath(file).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and not {"\0", "\\"} & set(file)


def _open_indexed(
    folder: Path, weight_map: Mapping[str, str], open_file: OpenFile | None
) -> tuple[tuple[SafetensorsFile, ...], Where]:
    shards: dict[str, SafetensorsFile] = {}
    for name, file in weight_map.items():
        if file not in shards:
            if open_file is None and not (folder / file).exists():
                raise CheckpointError(
                    f"{folder / file} is missing, which holds tensor {name!r} among others; download this file"
                )
            shards[file] = (open_file or SafetensorsFile.open)(folder / file)
        if name not in shards[file].tensors:
            raise damaged(folder / file, f"it lacks tensor {name!r}, which {INDEX_NAME} places there")
    _check_unlisted(shards, weight_map)
    where = {name: shards[file] for name, file in weight_map.items()}
    return tuple(shards[file] for file in sorted(shards)), where


def _check_unlisted(shards: Mapping[str, SafetensorsFile], weight_map: Mapping[str, str]) -> None:
    for file, shard in shards.items():
        for name in shard.names():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{shard.path} holds tensor {name!r}, which {INDEX_NAME} does not place there; "
                    f"the two are of different versions, download both again"
                )


def _present_mtp_layers(config: ModelConfig, where: Where) -> int:
    """How many MTP layers the files hold; one of which only some tensors are there counts, and is refused later."""
    numbers = {name.split(".")[2] for name in where if name.startswith("model.layers.")}
    layers = [int(number) for number in numbers if re.fullmatch("[0-9]{1,9}", number)]
    mtp_layers = range(config.n_layers, config.n_layers + config.n_mtp_layers)
    return max((layer - config.n_layers + 1 for layer in layers if layer in mtp_layers), default=0)


def _check_tensors(inventory: Inventory, where: Where, folder: Path) -> None:
    """Require exactly the inventory's tensors, each with its shape, an allowed type and, in FP8, its scales."""
    missing = [spec.source for spec in inventory.tensors if spec.source not in where]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's tensors, the first is {missing[0]!r}; "
            "download the model again"
        )
    for spec in inventory.tensors:
        _check_tensor(spec, where)
    for name in where.keys() - inventory.by_source.keys():
        _check_extra(name, inventory, where)


def _check_tensor(spec: TensorSpec, where: Where) -> None:
    shard = where[spec.source]
    stored = shard.spec(spec.source)
    if stored.shape != spec.shape:
        raise CheckpointError(
            f"{shard.path}: tensor {spec.source!r} has the shape {stored.shape}, and config.json asks for {spec.shape}"
            "; download config.json and this file again"
        )
    fmt = FORMAT_OF_DTYPE.get(stored.dtype)
    if fmt is None or fmt.name not in spec.representations:
        allowed = " or ".join(DTYPE_OF_FORMAT[name] for name in spec.representations)
        raise CheckpointError(
            f"{shard.path}: tensor {spec.source!r} is stored as {stored.dtype}, and config.json asks for {allowed}; "
            "download the model as it was published"
        )
    if fmt.block is not None:
        _check_scale(spec, where, fmt.scale_shape(spec.shape))


def _check_scale(spec: TensorSpec, where: Where, shape: tuple[int, ...] | None) -> None:
    name = spec.source + SCALE_SUFFIX
    if name not in where:
        raise CheckpointError(
            f"{where[spec.source].path}: tensor {spec.source!r} is FP8, and its scales {name!r} are missing; "
            "download the model again"
        )
    stored = where[name].spec(name)
    if stored.dtype != "F32" or stored.shape != shape:
        raise CheckpointError(
            f"{where[name].path}: tensor {name!r} is {stored.dtype} {stored.shape}, and 128x128 blocks of "
            f"{spec.source!r} need F32 {shape}; download the model as it was published"
        )


def _check_extra(name: str, inventory: Inventory, where: Where) -> None:
    """Accept a tensor beside the inventory's if it is the scale of an FP8 weight, or known to be superfluous."""
    if name.endswith(IGNORED_SUFFIXES):
        return
    path, weight = where[name].path, name.removesuffix(SCALE_SUFFIX)
    if weight == name or weight not in inventory.by_source:
        raise CheckpointError(
            f"{path} holds tensor {name!r}, which the model of config.json does not have; "
            "download config.json and this file again, from one place"
        )
    if where[weight].spec(weight).dtype != "F8_E4M3":
        raise CheckpointError(
            f"{path} holds scales {name!r} for a weight that is not FP8; download the model as it was published"
        )

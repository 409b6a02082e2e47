"""dsr1-store.json, the manifest that makes a folder a store. Every field is known, or the store is refused.

Fields: docs/formats.md, section A store.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.config import ModelConfig
from quant.errors import StoreError
from quant.json_object import parse_json_object
from quant.packed import PACKED_FORMATS, PackedFormat
from quant.store_formats import LINEARS, ExpertFormats, StoreFormats
from quant.store_layout import STORE_FORMAT, STORE_VERSION

MANIFEST_NAME = "dsr1-store.json"
REMEDY = "run `dsr1 quantize` again, into a new folder"
MAX_NAME_BYTES = 255  # of a file, in common file systems
KEYS = {"format", "version", "recipe", "formats", "experts", "linears", "embedding", "mtp_layers", "files"}
EXPERT_KEYS = {"layers", "gate_up", "down"}
MAX_LAYERS = 1 << 12
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """A file of a store. sha256: in hexadecimal."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """formats: what the store holds. mtp_layers: how many. files: every file but the manifest, by name."""

    formats: StoreFormats
    mtp_layers: int
    files: Mapping[str, FileRecord]

    def to_json(self) -> bytes:
        """The same manifest always gives the same bytes."""
        fields = _format_fields(self.formats) | {
            "format": STORE_FORMAT,
            "version": STORE_VERSION,
            "mtp_layers": self.mtp_layers,
            "files": {name: {"bytes": f.nbytes, "sha256": f.sha256} for name, f in self.files.items()},
        }
        return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _format_fields(formats: StoreFormats) -> dict[str, Any]:
    """What a manifest says of a store's formats."""
    return {
        "recipe": formats.recipe,
        "formats": {name: fmt.descriptor() for name, fmt in formats.packed.items()},
        "experts": [
            {"layers": [first, last], "gate_up": used.gate_up.name, "down": used.down.name}
            for first, last, used in _runs(formats.experts)
        ],
        "linears": {kind: [fmt.name for fmt in formats.linears[kind]] for kind in LINEARS},
        "embedding": formats.embedding,
    }


def _runs(experts: Mapping[int, ExpertFormats]) -> list[tuple[int, int, ExpertFormats]]:
    """First layer, last layer and formats of neighbouring layers that are alike."""
    runs: list[tuple[int, int, ExpertFormats]] = []
    for layer, used in sorted(experts.items()):
        if runs and runs[-1][1:] == (layer - 1, used):
            runs[-1] = (runs[-1][0], layer, used)
        else:
            runs.append((layer, layer, used))
    return runs


def formats_fingerprint(formats: StoreFormats) -> str:
    """Changes with anything that a manifest says of the formats."""
    return hashlib.sha256(json.dumps(_format_fields(formats), sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises StoreError for one that is missing, damaged or of an unknown kind."""
    path = folder / MANIFEST_NAME
    try:
        fields = parse_json_object(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{folder} has no {MANIFEST_NAME}, so it is not a store; {REMEDY}") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({error}); {REMEDY}") from None
    _check_kind(path, fields)
    formats = _store_formats(path, fields, _formats(path, fields["formats"]))
    mtp_layers = fields["mtp_layers"]
    if type(mtp_layers) is not int or mtp_layers < 0:
        raise _damaged(path, f"mtp_layers is {mtp_layers!r}")
    return Manifest(formats, mtp_layers, _files(path, fields["files"]))


def check_layers(folder: Path, manifest: Manifest, config: ModelConfig) -> None:
    """Raise StoreError unless the manifest has formats for just the layers that have experts."""
    layers = {layer for layer in range(config.n_layers + config.n_mtp_layers) if config.is_moe(layer)}
    different = sorted(layers ^ manifest.formats.experts.keys())
    if different:
        what = "lacks the formats of" if different[0] in layers else "has, against config.json, formats for"
        raise _damaged(folder / MANIFEST_NAME, f"it {what} the experts of layer {different[0]}")


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(f"{path} is damaged: {what}; {REMEDY}")


def _check_kind(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse another format or version before anything else is looked at."""
    if fields.get("format") != STORE_FORMAT:
        raise _damaged(path, f"its format is {fields.get('format')!r}, not {STORE_FORMAT!r}")
    version = fields.get("version")
    if version != STORE_VERSION:
        raise StoreError(
            f"{path} is of version {version!r}, and this dsr1 reads version {STORE_VERSION}; "
            f"use the dsr1 that wrote it, or {REMEDY}"
        )
    if fields.keys() != KEYS:
        [key, *_] = sorted(fields.keys() ^ KEYS)
        raise _damaged(path, f"{key!r} is missing" if key in KEYS else f"it has an unknown field {key!r}")


def _formats(path: Path, described: Any) -> dict[str, PackedFormat]:
    """The formats that the store uses, each described exactly as this version knows it."""
    if not isinstance(described, dict):
        raise _damaged(path, "formats is not an object")
    for name, descriptor in described.items():
        if name not in PACKED_FORMATS:
            raise StoreError(f"{path} uses a format {name!r} that this dsr1 does not read; update dsr1, or {REMEDY}")
        known = PACKED_FORMATS[name].descriptor()
        if descriptor != known:
            field = _first_difference(descriptor, known)
            raise StoreError(
                f"{path} describes another format {name!r} than this dsr1 reads (its {field} differs); "
                f"update dsr1, or {REMEDY}"
            )
    return {name: PACKED_FORMATS[name] for name in described}


def _first_difference(descriptor: Any, known: Mapping[str, Any]) -> str:
    if not isinstance(descriptor, dict):
        return "descriptor"
    keys = [*known, *sorted(descriptor.keys() - known.keys())]
    return next(repr(key) for key in keys if key not in descriptor or descriptor[key] != known.get(key))


def _store_formats(path: Path, fields: Mapping[str, Any], known: Mapping[str, PackedFormat]) -> StoreFormats:
    """known: the formats that the manifest describes; each of them is to be used, and no others."""
    recipe, embedding = fields["recipe"], fields["embedding"]
    if not isinstance(recipe, str) or embedding not in ("bf16", "f32"):
        raise _damaged(path, f"its recipe is {recipe!r}, with an embedding in {embedding!r}")
    linears = fields["linears"]
    if not isinstance(linears, dict) or linears.keys() != set(LINEARS):
        raise _damaged(path, f"linears does not name the formats of {', '.join(LINEARS)}")
    by_kind = {kind: _named(path, linears[kind], known) for kind in LINEARS}
    formats = StoreFormats(recipe, _experts(path, fields["experts"], known), by_kind, embedding)
    if formats.packed.keys() != known.keys():
        raise _damaged(path, "it describes formats that neither experts nor linears use")
    return formats


def _experts(path: Path, given: Any, known: Mapping[str, PackedFormat]) -> dict[int, ExpertFormats]:
    """The formats of each layer's experts, from runs of layers."""
    experts: dict[int, ExpertFormats] = {}
    for run in given if isinstance(given, list) else [None]:
        if not isinstance(run, dict) or run.keys() != EXPERT_KEYS:
            raise _damaged(path, "experts is not a list of objects with layers, gate_up and down")
        formats = ExpertFormats(*_named(path, [run["gate_up"], run["down"]], known))
        for layer in _layers(path, run["layers"]):
            if layer in experts:
                raise _damaged(path, f"experts names layer {layer} twice")
            experts[layer] = formats
    return experts


def _layers(path: Path, given: Any) -> range:
    if isinstance(given, list) and len(given) == 2 and all(type(number) is int for number in given):
        first, last = given
        if 0 <= first <= last < MAX_LAYERS:
            return range(first, last + 1)
    raise _damaged(path, f"experts has {given!r} for a first and a last layer")


def _named(path: Path, names: Any, known: Mapping[str, PackedFormat]) -> tuple[PackedFormat, ...]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name in known for name in names):
        raise _damaged(path, f"experts or linears names {names!r}, and not formats that it describes")
    return tuple(known[name] for name in names)


def _files(path: Path, files: Any) -> dict[str, FileRecord]:
    if not isinstance(files, dict):
        raise _damaged(path, "files is not an object")
    return {name: _file(path, name, entry) for name, entry in files.items()}


def _file(path: Path, name: str, entry: Any) -> FileRecord:
    if name in ("", ".", "..", MANIFEST_NAME) or set(name) & set("/\\\0") or len(name.encode()) > MAX_NAME_BYTES:
        raise _damaged(path, f"{name!r} is not the name of a file in the store")
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
        raise _damaged(path, f"file {name!r} has other fields than bytes and sha256")
    nbytes, sha256 = entry["bytes"], entry["sha256"]
    if type(nbytes) is not int or nbytes < 0 or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise _damaged(path, f"file {name!r} has an impossible size or checksum")
    return FileRecord(nbytes, sha256)

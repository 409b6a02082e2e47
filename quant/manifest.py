"""dsr1-store.json, the manifest that makes a folder a store. Every field is known, or the store is refused.

Fields: docs/formats.md, section A store.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import StoreError
from quant.json_object import parse_json_object
from quant.packed import PACKED_FORMATS, PackedFormat
from quant.recipes import Recipe
from quant.store_layout import STORE_FORMAT, STORE_VERSION

MANIFEST_NAME = "dsr1-store.json"
REMEDY = "run `dsr1 quantize` again, into a new folder"
MAX_NAME_BYTES = 255  # of a file, in common file systems
KEYS = {"format", "version", "recipe", "formats", "experts", "linears", "embedding", "mtp_layers", "files"}
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """A file of a store. sha256: in hexadecimal."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """recipe: what the store holds. mtp_layers: how many. files: every file but the manifest, by name."""

    recipe: Recipe
    mtp_layers: int
    files: Mapping[str, FileRecord]

    def to_json(self) -> bytes:
        """The same manifest always gives the same bytes."""
        formats = {fmt.name: fmt for fmt in (self.recipe.experts, *self.recipe.linears)}
        fields = {
            "format": STORE_FORMAT,
            "version": STORE_VERSION,
            "recipe": self.recipe.name,
            "formats": {name: fmt.descriptor() for name, fmt in formats.items()},
            "experts": self.recipe.experts.name,
            "linears": [fmt.name for fmt in self.recipe.linears],
            "embedding": self.recipe.embedding,
            "mtp_layers": self.mtp_layers,
            "files": {name: {"bytes": f.nbytes, "sha256": f.sha256} for name, f in self.files.items()},
        }
        return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


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
    formats = _formats(path, fields["formats"])
    recipe = _recipe(path, fields, formats)
    mtp_layers = fields["mtp_layers"]
    if type(mtp_layers) is not int or mtp_layers < 0:
        raise _damaged(path, f"mtp_layers is {mtp_layers!r}")
    return Manifest(recipe, mtp_layers, _files(path, fields["files"]))


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


def _recipe(path: Path, fields: Mapping[str, Any], formats: Mapping[str, PackedFormat]) -> Recipe:
    name, experts, linears, embedding = (fields[key] for key in ("recipe", "experts", "linears", "embedding"))
    if not isinstance(name, str) or embedding not in ("bf16", "f32"):
        raise _damaged(path, f"its recipe is {name!r}, with an embedding in {embedding!r}")
    if not isinstance(linears, list) or not linears or not all(isinstance(used, str) for used in [experts, *linears]):
        raise _damaged(path, "experts and linears are not names of formats")
    if {experts, *linears} != formats.keys() or len(set(linears)) < len(linears):
        raise _damaged(path, "experts and linears name other formats than it describes")
    return Recipe(name, formats[experts], tuple(formats[linear] for linear in linears), embedding)


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

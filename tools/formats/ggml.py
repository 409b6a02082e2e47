"""llama.cpp's own quantizer, called in the library of a llama-cpp-python that benchmarks/environments.py installed."""

import ctypes
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.environments import LLAMA, default_folder
from quant.errors import Dsr1Error

Floats = NDArray[np.float32]

TYPES = {"Q4_0": 2, "Q4_K": 12}
BITS = {"Q4_0": 4.5, "Q4_K": 4.5}
COLUMNS = {"Q4_0": 32, "Q4_K": 256}  # a row holds whole blocks


class Ggml:
    """The library. envs: where environments are kept."""

    def __init__(self, envs: Path | None = None) -> None:
        folder = (envs or default_folder()) / f"{LLAMA.name}-{LLAMA.version}"
        found = sorted(folder.glob("lib/python*/site-packages/llama_cpp/lib/libggml-base.so"))
        if not found:
            raise Dsr1Error(f"there is no llama.cpp in {folder}; run `python -m benchmarks.environments llama-cpp`")
        self.library = ctypes.CDLL(str(found[0]))
        self.library.ggml_row_size.restype = ctypes.c_size_t
        self.library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            *[ctypes.c_int64] * 3,
            ctypes.c_void_p,
        ]

    def quantised(self, weight: Floats, name: str) -> Floats:
        """What a matrix is after its way through the format `name`, with no importance matrix."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        weight = np.ascontiguousarray(weight, np.float32)
        rows, columns = weight.shape
        nbytes = rows * self.library.ggml_row_size(TYPES[name], columns)
        out = np.zeros(nbytes, np.uint8)
        done = self.library.ggml_quantize_chunk(
            TYPES[name], weight.ctypes.data, out.ctypes.data, 0, rows, columns, None
        )
        if done != nbytes:
            raise Dsr1Error(f"llama.cpp wrote {done} bytes of {name}, not {nbytes}")
        values: Floats = dequantize(out.reshape(rows, -1), GGMLQuantizationType(TYPES[name])).astype(np.float32)
        return values.reshape(rows, columns)

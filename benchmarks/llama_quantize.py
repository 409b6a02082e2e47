"""llama.cpp's own quantiser on an F16 file of R1's widths. It runs in llama.cpp's environment.

    python -m benchmarks.llama_quantize DIR TYPE EXPERTS THREADS

Every matrix becomes TYPE (as `llama-quantize --pure`). The file has one layer with EXPERTS experts.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import llama_cpp

from benchmarks.model_setup import shape_fields
from benchmarks.random_gguf import ALIGNMENT, RandomRows, model_tensors, open_writer
from quant.config import parse_config

FILE_TYPES = {"Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "Q4_K": "LLAMA_FTYPE_MOSTLY_Q4_K_S"}


def write_f16(path: Path, experts: int) -> int:
    """The file; its weights in matrices."""
    fields = shape_fields("r1", experts) | {"num_hidden_layers": 2, "first_k_dense_replace": 1, "vocab_size": 4096}
    config = parse_config({name: value for name, value in fields.items() if name != "quantization_config"})
    tensors, rows = model_tensors(config), RandomRows()
    writer = open_writer(path, config, tensors)
    assert writer.fout is not None
    for tensor in tensors:
        writer.fout[0].write(bytes(-writer.fout[0].tell() % ALIGNMENT))
        for piece in rows.pieces(tensor):
            writer.fout[0].write(piece.data)
    writer.fout[0].write(bytes(-writer.fout[0].tell() % ALIGNMENT))
    writer.close()
    return sum(tensor.nbytes // 2 for tensor in tensors if len(tensor.shape) > 1)


def main() -> None:
    folder, kind, experts, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "f16.gguf", folder / "quantised.gguf"
    try:
        weights = write_f16(source, experts)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.pure, parameters.nthread = getattr(llama_cpp, FILE_TYPES[kind]), True, threads
        begin, cpu = time.perf_counter(), time.process_time()
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        if status:
            sys.exit("llama.cpp does not quantise the file")
        sizes = {"source_bytes": source.stat().st_size, "store_bytes": target.stat().st_size}
        print(json.dumps({"seconds": seconds, "cpu_s": cpu, "weights": weights, **sizes}))
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

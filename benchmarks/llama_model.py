"""A worker: a model in llama.cpp, in its environment. Run by model.py, as a module.

prefill N: a prompt of N tokens. decode P N: N greedy tokens after a prompt of P, which is not timed.
"""

import argparse
import ctypes
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.model_setup import prompt
from benchmarks.protocol import Command, Fields, serve, timed

BATCH = 512  # tokens at once, as in llama.cpp's own benchmark
CONTEXT = 4096


class Model:
    """A file that is loaded. repack: whether llama.cpp may lay weights out anew for its faster kernels."""

    def __init__(self, file: Path, threads: int, repack: bool) -> None:
        llama_cpp.llama_backend_init()
        model_parameters = llama_cpp.llama_model_default_params()
        model_parameters.n_gpu_layers, model_parameters.use_extra_bufts = 0, repack
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_parameters)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = CONTEXT, BATCH, BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context: Any = llama_cpp.llama_init_from_model(self.model, parameters) if self.model else None
        if self.context is None:
            sys.exit(f"llama.cpp does not load {file}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def append(self, ids: list[int]) -> int:
        """Run more tokens; returns the likeliest next one."""
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(part)))
            if status:
                sys.exit(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocab,)).argmax())


def start(file: Path, threads: int, repack: bool) -> tuple[Fields, dict[str, Command]]:
    """Load the model."""
    model = Model(file, threads, repack)

    def prefill(tokens: int) -> Fields:
        model.clear()
        ids = prompt(tokens, model.vocab)
        return timed(lambda: model.append(ids))

    def decode(before: int, tokens: int) -> Fields:
        model.clear()
        token = model.append(prompt(before, model.vocab))

        def generate() -> None:
            nonlocal token
            for _ in range(tokens):
                token = model.append([token])

        return timed(generate)

    about = {"weight_bytes": llama_cpp.llama_model_size(model.model)}
    return about, {"prefill": prefill, "decode": decode}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--no-repack", dest="repack", action="store_false")
    told = parser.parse_args()
    serve(lambda: start(told.file, told.threads, told.repack))

"""What llama.cpp makes of a GGUF file: token ids of texts, greedy answers, logits. It runs in llama.cpp's environment.

python -m benchmarks.llama_reply FILE REQUEST RESULT

REQUEST is JSON: {"texts": [TEXT], "greedy": [IDS], "new_tokens": N, "stop": [ID], "logits": [IDS]}. RESULT is an .npz
with token ids "texts.0" ..., answers "greedy.0" ... without their prompts, and "logits.0" ..., float32 [tokens, vocab].
"""

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

CONTEXT = 2048


class Model:
    """A file that is loaded."""

    def __init__(self, file: Path) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = CONTEXT
        parameters.n_threads = parameters.n_threads_batch = 1  # two would wait for each other with such small matrices
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        self.context: Any = llama_cpp.llama_init_from_model(self.model, parameters) if self.model else None
        if self.context is None:
            sys.exit(f"llama.cpp does not load {file}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written in the text are recognised."""
        data = text.encode()
        out = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), out, len(out), False, True)
        return list(out[:count])

    def logits(self, ids: list[int], fresh: bool = True) -> NDArray[np.float32]:
        """Of each position: float32 [tokens, vocab]. fresh: forget what came before."""
        if fresh:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
            self.position = 0
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self.position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, True
        batch.n_tokens = len(ids)
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            sys.exit(f"llama_decode returned {status}")
        self.position += len(ids)
        values = llama_cpp.llama_get_logits(self.context)
        shape = (len(ids), self.vocab_size)
        return np.ctypeslib.as_array(ctypes.cast(values, ctypes.POINTER(ctypes.c_float)), shape).copy()

    def greedy(self, ids: list[int], count: int, stop: list[int]) -> list[int]:
        """Up to `count` tokens after `ids`; one of `stop` is the last."""
        token = int(self.logits(ids)[-1].argmax())
        answer = [token]
        while len(answer) < count and token not in stop:
            token = int(self.logits([token], fresh=False)[-1].argmax())
            answer.append(token)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("file", "request", "result"):
        parser.add_argument(name, type=Path)
    told = parser.parse_args()
    request, model = json.loads(told.request.read_text()), Model(told.file)
    arrays: dict[str, Any] = {}
    for i, text in enumerate(request.get("texts", [])):
        arrays[f"texts.{i}"] = np.array(model.encode(text), np.int64)
    for i, ids in enumerate(request.get("greedy", [])):
        answer = model.greedy(ids, request["new_tokens"], request.get("stop", []))
        arrays[f"greedy.{i}"] = np.array(answer, np.int64)
    for i, ids in enumerate(request.get("logits", [])):
        arrays[f"logits.{i}"] = model.logits(ids)
    np.savez(told.result, **arrays)


if __name__ == "__main__":
    main()

"""Writes a GGUF file of a published model's shape with random weights. It runs in llama.cpp's environment.

python -m benchmarks.random_gguf FILE TYPE [--shape moonlight] [--routed N]

TYPE is Q4_0, which then is the type of every matrix, or a mixture such as Q4_K_M: llama.cpp itself is asked, by a dry
run of its quantiser over a file without contents, which type each matrix would get. Weights are Gaussian, 256 rows of
each width and type, quantised by llama.cpp; matrices are put together of these rows.
"""

import argparse
import ctypes
import os
import sys
from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from benchmarks.gguf_layout import Shape, stays_float, tensor_shapes, types_in
from benchmarks.model_setup import BOS, EOS, SHAPES, shape_fields, token_names
from quant.config import ModelConfig, parse_config

PURE = ("Q4_0", "Q8_0")  # one type for all matrices; other names are mixtures
POOL_ROWS = 256
PIECE_BYTES = 1 << 24
ALIGNMENT = 32  # of a tensor in the file


class GgufTensor(NamedTuple):
    """A tensor in the file."""

    name: str
    shape: Shape
    type: GgmlType

    @property
    def row_bytes(self) -> int:
        block, nbytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * nbytes

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


def model_tensors(config: ModelConfig) -> list[GgufTensor]:
    """All tensors, matrices in half precision."""
    return [
        GgufTensor(name, shape, GgmlType.F32 if stays_float(name, shape) else GgmlType.F16)
        for name, shape in tensor_shapes(config).items()
    ]


def open_writer(path: Path, config: ModelConfig, tensors: list[GgufTensor]) -> gguf.GGUFWriter:
    """A file with everything but the tensors' bytes."""
    writer = gguf.GGUFWriter(path, "deepseek2")
    add_shape(writer, config)
    add_tokenizer(writer, config.vocab_size)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def add_shape(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """What config.json says, under llama.cpp's names. Its cache holds latents, so that keys have their width."""
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_leading_dense_block_count(config.n_dense_layers)
    writer.add_feed_forward_length(config.inter_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(1)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.latent_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.n_activated_experts)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_inter_dim)
    writer.add_expert_weights_scale(config.route_scale)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config.n_expert_groups > 1:
        writer.add_expert_group_count(config.n_expert_groups)
        writer.add_expert_group_used_count(config.n_limited_groups)


def add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """A tokenizer that llama.cpp accepts; no text is read with it."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-llm")
    writer.add_token_list(token_names(vocab))
    writer.add_token_merges(["t 1"])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)


def typed(tensors: list[GgufTensor], kind: str, skeleton: Path, config: ModelConfig) -> list[GgufTensor]:
    """The same tensors in the types of `kind`. skeleton: a name for a file that is needed meanwhile."""
    if kind in PURE:
        return [tensor._replace(type=GgmlType[kind]) if tensor.type == GgmlType.F16 else tensor for tensor in tensors]
    open_writer(skeleton, config, tensors).close()
    try:
        size = sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)
        os.truncate(skeleton, skeleton.stat().st_size + ALIGNMENT + size)  # takes no room on the disk
        types = types_in(dry_run(skeleton, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")))
    finally:
        skeleton.unlink()
    return [tensor._replace(type=GgmlType[types[tensor.name]]) for tensor in tensors]


def dry_run(path: Path, file_type: int) -> str:
    """What llama.cpp's quantiser says it would do."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        lines.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.dry_run = file_type, True
    status = llama_cpp.llama_model_quantize(str(path).encode(), b"/dev/null", ctypes.byref(parameters))
    text = "".join(lines)
    if status:
        sys.exit(f"llama.cpp does not quantise {path}, it says:\n{text[-2000:]}")
    return text


class RandomRows:
    """Bytes of tensors, in pieces."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._pool = cache(self._quantise_pool)
        folder = Path(llama_cpp.__file__).parent / "lib"
        self._quantise: Any = ctypes.CDLL(str(folder / "libggml-base.so")).ggml_quantize_chunk
        self._quantise.restype = ctypes.c_size_t
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._quantise.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]

    def pieces(self, tensor: GgufTensor) -> Iterator[NDArray[np.uint8]]:
        """The bytes. Norms are ones and biases zeros, so that all experts are chosen about as often."""
        if len(tensor.shape) == 1:
            values = np.zeros if tensor.name.endswith("bias") else np.ones
            yield values(tensor.shape, np.float32).view(np.uint8)
            return
        pool, rows = self._pool(tensor.type, tensor.shape[-1]), prod(tensor.shape[:-1])
        step = max(1, PIECE_BYTES // tensor.row_bytes)
        for first in range(0, rows, step):
            yield pool[self._rng.integers(POOL_ROWS, size=min(step, rows - first))]

    def _quantise_pool(self, kind: GgmlType, columns: int) -> NDArray[np.uint8]:
        """uint8 [POOL_ROWS, bytes of a row]."""
        values = self._rng.standard_normal((POOL_ROWS, columns), np.float32) / np.float32(columns**0.5)
        if kind == GgmlType.F32:
            return values.view(np.uint8)
        out = np.empty((POOL_ROWS, GgufTensor("", (columns,), kind).row_bytes), np.uint8)
        self._quantise(kind, values.ctypes.data, out.ctypes.data, 0, POOL_ROWS, columns, None)
        return out


def write_gguf(path: Path, kind: str, fields: dict[str, Any]) -> list[GgufTensor]:
    """Write the file; returns what it holds. It appears only when it is whole."""
    config, part = parse_config(fields), path.with_name(path.name + ".part")
    tensors = typed(model_tensors(config), kind, path.with_name(path.name + ".skeleton"), config)
    writer, rows = open_writer(part, config, tensors), RandomRows()
    assert writer.fout is not None
    file = writer.fout[0]
    for tensor in tensors:
        file.write(bytes(-file.tell() % ALIGNMENT))
        for piece in rows.pieces(tensor):
            file.write(piece.data)
    file.write(bytes(-file.tell() % ALIGNMENT))
    writer.close()
    part.rename(path)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("type", metavar="TYPE")
    parser.add_argument("--shape", choices=SHAPES, default="moonlight")
    parser.add_argument("--routed", type=int, help="fewer routed experts than the model has, for a quick try")
    told = parser.parse_args()
    tensors = write_gguf(told.file, told.type, shape_fields(told.shape, told.routed))
    for kind in sorted({tensor.type for tensor in tensors}):
        held = [tensor for tensor in tensors if tensor.type == kind]
        print(f"{kind.name}: {len(held)} tensors, {sum(tensor.nbytes for tensor in held) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

"""An Engine: immutable weights, and the sessions that run on them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from hybrid_rt.cache import LatentCache
from hybrid_rt.generation_config import load_sampling
from hybrid_rt.latent_attention import CachedAttention
from hybrid_rt.loader import load_transformer
from hybrid_rt.models import resolve_model
from hybrid_rt.rope import softmax_scale
from hybrid_rt.sampling import Sampling
from hybrid_rt.session import Session, Step
from hybrid_rt.thinking import open_thinking
from hybrid_rt.tokenizer import Tokenizer
from hybrid_rt.trace import Trace, trace_chunks
from hybrid_rt.transformer import Transformer
from offload.backend import CpuBackend
from offload.experts import ExpertBuffers
from offload.sizes import format_size, parse_size
from quant.checkpoint import Checkpoint
from quant.config import ModelConfig
from quant.errors import ContextError, DeviceError, Dsr1Error, TokenizerError
from quant.kernels import set_threads

DEFAULT_CONTEXT = 32768
PREFILL_CHUNK = 512
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Engine:
    """A loaded model. Use `Engine.load`; sessions and their caches are made from it.

    `notes` are sentences about choices made while loading that a user should see.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        transformer: Transformer,
        buffers: ExpertBuffers,
        tokenizer: Tokenizer,
        context: int,
        notes: list[str],
    ) -> None:
        self.folder, self.config = checkpoint.folder, checkpoint.config
        self.transformer, self.buffers, self.tokenizer = transformer, buffers, tokenizer
        self.context, self.notes = context, notes
        self.default_sampling = load_sampling(self.folder)
        self.prefill_chunk = buffers.max_tokens
        self.scale = softmax_scale(self.config)

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        gpu_mem: str | int | None = None,
        ram: str | int | None = None,
        context: int | None = None,
        device: str = "auto",
        dtype: str = "bfloat16",
        threads: int | None = None,
    ) -> "Engine":
        """Open a model folder, a built-in model or a Hub id that was downloaded.

        gpu_mem, ram: budgets such as "24G" (GiB). context: tokens a session may hold; by default 32768 or the
        model's maximum. dtype: of activations and of the cache, "bfloat16" or "float32". threads: by default
        all cores that this process may use. Raises Dsr1Error, told in a sentence, when the model cannot run.
        """
        notes: list[str] = []
        _check_device(device, gpu_mem, notes)
        if dtype not in DTYPES:
            raise Dsr1Error(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        checkpoint = Checkpoint.open(resolve_model(model))
        config = checkpoint.config
        context = choose_context(context, config.max_seq_len, notes)
        _check_ram(ram, config, context, DTYPES[dtype])
        tokenizer = Tokenizer.load(checkpoint.folder)
        if tokenizer.vocab_size > config.vocab_size:
            raise TokenizerError(
                f"{checkpoint.folder} has a tokenizer of {tokenizer.vocab_size} ids and embeddings of "
                f"{config.vocab_size} rows; take tokenizer.json from the same model"
            )
        use_threads(threads)
        backend = CpuBackend()
        buffers = ExpertBuffers(config, backend, min(PREFILL_CHUNK, context))
        transformer = load_transformer(checkpoint, DTYPES[dtype], backend, buffers)
        return cls(checkpoint, transformer, buffers, tokenizer, context, notes)

    def session(self) -> Session:
        """A conversation of its own, with an empty cache."""
        return Session(self)

    def new_cache(self, capacity: int) -> LatentCache:
        """An empty latent cache for `capacity` tokens."""
        return LatentCache(self.config, capacity, self.transformer.dtype, torch.device("cpu"))

    def generate(self, ids: Sequence[int], sampling: Sampling | None = None) -> Iterator[Step]:
        """`Session.generate` in a session of its own."""
        return self.session().generate(ids, sampling or self.default_sampling)

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        """Append up to `prefill_chunk` tokens (int64 [T]) to `cache`; returns their final states [T, dim]."""
        context = CachedAttention(cache, ids.shape[0], self.scale)
        try:
            states: torch.Tensor = self.transformer(ids, context)
        except BaseException:  # Ctrl+C among others: the next forward pass needs the buffers
            self.buffers.abandon()
            raise
        cache.length += ids.shape[0]
        return states

    @torch.inference_mode()
    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits float32 [T, vocab] of final states [T, dim]."""
        return self.transformer.head(states).float()

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits of every position: float32 [len(ids), vocab]."""
        checked = self.check_ids(ids)
        cache = self.new_cache(len(checked))
        logits = torch.empty(len(checked), self.config.vocab_size)
        for chunk in checked.split(self.prefill_chunk):
            first = cache.length
            logits[first : first + len(chunk)] = self.head(self.forward(chunk, cache))
        return logits

    def trace(self, ids: Sequence[int]) -> Trace:
        """Hidden states after the embedding and each layer, and every MoE layer's choices of experts."""
        checked = self.check_ids(ids)
        cache = self.new_cache(len(checked))
        return trace_chunks(
            lambda chunk: self.forward(chunk, cache), self.transformer, checked.split(self.prefill_chunk)
        )

    def prompt_ids(self, messages: Sequence[Mapping[str, str]], think: bool | None = None) -> list[int]:
        """A conversation (`role` and `content` of each message) as the tokens to generate from.

        think: True opens the thinking, False opens and closes it, None leaves it to the model's template.
        """
        prompt = self.tokenizer.chat_template.render(messages)
        return self.tokenizer.encode(open_thinking(prompt, think))

    def check_ids(self, ids: Sequence[int]) -> torch.Tensor:
        """`ids` as int64 [T]. Raises ContextError if there are none or too many, Dsr1Error if one is no token."""
        checked = torch.as_tensor(ids, dtype=torch.int64)
        if checked.dim() != 1 or len(checked) == 0:
            raise ContextError("the prompt has no tokens; give at least one")
        if len(checked) > self.context:
            raise ContextError(
                f"the prompt has {len(checked)} tokens and the context holds {self.context}; "
                f"shorten it or give a larger --context (the model's maximum is {self.config.max_seq_len})"
            )
        if checked.min() < 0 or checked.max() >= self.config.vocab_size:
            raise Dsr1Error(f"a token id is outside of the vocabulary, which has {self.config.vocab_size} rows")
        return checked


def choose_context(asked: int | None, maximum: int, notes: list[str]) -> int:
    """The context asked for, or the default, clamped to the model's `maximum` with a note."""
    if asked is None:
        if maximum < DEFAULT_CONTEXT:
            notes.append(f"context: {maximum} tokens, the model's maximum (the default is {DEFAULT_CONTEXT})")
        return min(DEFAULT_CONTEXT, maximum)
    if asked < 1:
        raise ContextError(f"a context of {asked} tokens is too small; give at least 1")
    if asked > maximum:
        raise ContextError(f"a context of {asked} tokens is more than the model's maximum; give at most {maximum}")
    return asked


def use_threads(threads: int | None) -> None:
    """Let kernels and torch use `threads` threads; by default the cores that this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is not None and threads < 1:
        raise Dsr1Error(f"{threads} threads are too few; give at least 1")
    count = min(threads or available, available)
    torch.set_num_threads(count)
    set_threads(count)


def _check_device(device: str, gpu_mem: str | int | None, notes: list[str]) -> None:
    if device not in ("auto", "cpu"):
        raise DeviceError(f"device {device!r} is not available in this version; use cpu or auto")
    if gpu_mem is not None:
        parse_size(gpu_mem)
        notes.append("--gpu-mem is without effect: this version runs on the CPU")


def _check_ram(ram: str | int | None, config: ModelConfig, context: int, dtype: torch.dtype) -> None:
    """The cache is what grows with the context; weights are mapped and may leave memory at any time."""
    if ram is None:
        return
    needed = config.n_layers * context * config.latent_dim * dtype.itemsize
    if needed > parse_size(ram):
        raise ContextError(
            f"the latent cache of {context} tokens takes {format_size(needed)}, more than --ram {ram}; "
            "give a smaller --context or more --ram"
        )

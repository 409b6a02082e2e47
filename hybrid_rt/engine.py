"""An Engine: immutable weights, and the sessions that run on them."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from hybrid_rt.cache import LatentCache
from hybrid_rt.generation_config import load_sampling
from hybrid_rt.gpu_attention import attention_context
from hybrid_rt.graph_step import MOST_TOKENS, GraphSteps
from hybrid_rt.loader import Loading, Source, load_transformer, open_model
from hybrid_rt.models import resolve_model
from hybrid_rt.planning import check_recipe, make_backend, plan_model
from hybrid_rt.rope import softmax_scale
from hybrid_rt.sampling import Sampling
from hybrid_rt.session import Session, Step
from hybrid_rt.thinking import open_thinking
from hybrid_rt.token_step import TokenStep
from hybrid_rt.tokenizer import Tokenizer
from hybrid_rt.trace import Trace, trace_chunks
from hybrid_rt.transformer import Transformer
from offload.experts import ExpertBuffers
from offload.graphs import GraphingBackend
from offload.hardware import allowed_cores
from offload.plan import Plan
from offload.topology import read_topology
from offload.wishes import Wishes
from quant.conversion import as_float32
from quant.errors import ContextError, Dsr1Error, TokenizerError
from quant.kernels import set_threads
from quant.kernels.ahead import PACKED_KERNELS, PLAIN_KERNELS, compile_ahead
from quant.progress import Progress, Steps, untold
from quant.progress import ignore as ignore_progress
from quant.store import Store

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Engine:
    """A loaded model. Use `Engine.load`; sessions and their caches are made from it.

    `notes` are sentences about choices made while loading that a user should see.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        transformer: Transformer,
        buffers: ExpertBuffers,
        tokenizer: Tokenizer,
        notes: list[str],
    ) -> None:
        self.folder, self.config, self.plan = source.folder, source.config, plan
        self.transformer, self.buffers, self.tokenizer = transformer, buffers, tokenizer
        self.backend, self.context, self.notes = buffers.backend, plan.context, notes
        self.default_sampling = load_sampling(self.folder)
        self.prefill_chunk = plan.prefill_chunk
        self.scale = softmax_scale(self.config)
        self._turn = threading.Lock()  # sessions on several threads share the experts' buffers

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        gpu_mem: str | int | None = None,
        ram: str | int | None = None,
        context: int | None = None,
        device: str = "auto",
        dtype: str = "bfloat16",
        recipe: str | None = None,
        threads: int | None = None,
        residency: str | None = None,
        plan: str | Path | None = None,
        pins: Sequence[str] = (),
        defer_experts: int | None = None,
        verify: bool = False,
        progress: Callable[[Progress], None] = ignore_progress,
        compiling: Steps = untold,
    ) -> "Engine":
        """Open a model folder, a built-in model or a Hub id that was downloaded.

        gpu_mem, ram: budgets such as "24G" (GiB). context: tokens a session may hold; by default 32768 or the
        model's maximum. dtype: of activations and of the cache, "bfloat16" or "float32". recipe: that of the store
        (of the built-in model: the one to take). threads: by default all cores that this process may use. residency:
        of routed experts, "mapped", "locked" or "copied"; by default the plan's choice. plan: a file that
        `dsr1 plan --save` wrote. pins: single choices that the plan keeps to, as "experts:3-5=gpu". defer_experts: how
        many of a token's experts join one layer later in decoding; by default none. verify: whether to read the whole
        store once and compare its checksums. progress: is told of bytes that are verified, locked or copied. compiling:
        told of kernels that are compiled, which takes seconds the first time on a machine. Raises Dsr1Error, told in a
        sentence, when the model cannot run.
        """
        notes: list[str] = []
        if dtype not in DTYPES:
            raise Dsr1Error(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        source = open_model(resolve_model(model, recipe, notes, compiling))
        check_recipe(source, recipe)
        if verify:
            verify_model(source, notes, progress)
        topology = read_topology()
        saved = None if plan is None else str(plan)
        wishes = Wishes(gpu_mem, ram, context, device, dtype, residency, tuple(pins), None, None, saved, defer_experts)
        chosen = plan_model(source, wishes, notes, topology)
        tokenizer = load_tokenizer(source)
        use_threads(threads)
        compile_ahead(PACKED_KERNELS if isinstance(source, Store) else PLAIN_KERNELS, compiling)
        backend = make_backend(chosen, source.config)
        buffers = ExpertBuffers(source.config, backend, chosen.host_tokens)
        loading = Loading(topology, notes, progress)
        transformer = load_transformer(source, chosen, DTYPES[dtype], backend, buffers, loading)
        return cls(source, chosen, transformer, buffers, tokenizer, notes)

    def session(self) -> Session:
        """A conversation of its own, with an empty cache."""
        return Session(self)

    def new_cache(self, capacity: int) -> LatentCache:
        """An empty latent cache for `capacity` tokens."""
        return LatentCache(self.config, capacity, self.plan.cache_format, self.backend)

    def generate(self, ids: Sequence[int], sampling: Sampling | None = None) -> Iterator[Step]:
        """`Session.generate` in a session of its own."""
        return self.session().generate(ids, sampling or self.default_sampling)

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, cache: LatentCache, hooked: bool = False) -> torch.Tensor:
        """Append up to `prefill_chunk` tokens (int64 [T]) to `cache`; returns their final states [T, dim].

        hooked: whether every module has to be called, because hooks look into it. Threads take turns.
        """
        with self._turn:
            try:
                with self.backend.counting():
                    states = self._states(ids, cache, hooked)
            except BaseException:  # Ctrl+C among others: the next forward pass needs the buffers
                self.buffers.abandon()
                raise
            cache.length += ids.shape[0]
        return states

    def _states(self, ids: torch.Tensor, cache: LatentCache, hooked: bool) -> torch.Tensor:
        if len(ids) == 1 and self.backend.is_host and not hooked:
            return self._step(cache).forward(ids, cache)
        if len(ids) <= MOST_TOKENS and isinstance(self.backend, GraphingBackend) and not hooked:
            return self._graphs(cache, self.backend).forward(ids, cache)
        return self.transformer(ids, attention_context(cache, len(ids), self.scale))

    def _step(self, cache: LatentCache) -> TokenStep:
        if cache.step is None:
            cache.step = TokenStep(self.transformer, self.scale)
        return cache.step

    def _graphs(self, cache: LatentCache, backend: GraphingBackend) -> GraphSteps:
        if cache.graphs is None:
            cache.graphs = GraphSteps(self.transformer, self.scale, backend)
        return cache.graphs

    @torch.inference_mode()
    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits float32 [T, vocab] of final states [T, dim]."""
        with self.backend.counting():
            logits = self.transformer.head(states)
            return as_float32(logits) if self.backend.is_host else logits.float().cpu()

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
            lambda chunk: self.forward(chunk, cache, hooked=True), self.transformer, checked.split(self.prefill_chunk)
        )

    def prompt_ids(self, messages: Sequence[Mapping[str, str]], think: bool | None = None) -> list[int]:
        """A conversation (`role` and `content` of each message) as the tokens to generate from.

        think: True opens the thinking, False opens and closes it, None leaves it to the model's template.
        """
        prompt = self.tokenizer.chat_template.render(messages)
        return self.tokenizer.encode(open_thinking(prompt, think))

    def history_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation as the tokens that stand before whatever is asked next."""
        return self.tokenizer.encode(self.tokenizer.chat_template.render(messages, add_generation_prompt=False))

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


def load_tokenizer(source: Source) -> Tokenizer:
    """The model's tokenizer. Raises TokenizerError if it is missing, damaged, or another model's."""
    tokenizer = Tokenizer.load(source.folder)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise TokenizerError(
            f"{source.folder} has a tokenizer of {tokenizer.vocab_size} ids and embeddings of "
            f"{source.config.vocab_size} rows; take tokenizer.json from the same model"
        )
    return tokenizer


def verify_model(source: Source, notes: list[str], progress: Callable[[Progress], None]) -> None:
    """Compare the checksums of a store. Raises StoreError naming the files that differ."""
    if isinstance(source, Store):
        source.verify(progress)
    else:
        notes.append("--verify is without effect: a published checkpoint carries no checksums")


def use_threads(threads: int | None) -> None:
    """Let kernels and torch use `threads` threads; by default the cores that this process may use."""
    available = allowed_cores()
    if threads is not None and threads < 1:
        raise Dsr1Error(f"{threads} threads are too few; give at least 1")
    count = min(threads or available, available)
    torch.set_num_threads(count)
    set_threads(count)

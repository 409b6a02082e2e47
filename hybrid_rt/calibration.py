"""Calibration: a text is carried through a checkpoint, one layer at a time, to see how large each matrix's inputs are.

The hidden states of all tokens are kept, and a layer runs when the first of its matrices is asked for: that is when a
conversion comes to it. So no second copy of the model is needed, and memory holds (T tokens, D dim, E experts of I):

    hidden states, and the inputs of a layer's experts      2 x 4 T D bytes
    mean squares of all layers                              4 E (D + I) a layer
    what is at work: up to 4096 tokens of one expert, or a window's attention

Activations are float32 and weights as they are published. The figures are the same to the bit with any number of
threads: our kernels multiply with all of them; torch's operators, whose sums depend on it, run on one.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hybrid_rt.attention import MLA, HeadMatrix
from hybrid_rt.cache import LatentCache
from hybrid_rt.evaluate.windows import cut
from hybrid_rt.gate import Gate
from hybrid_rt.latent_attention import CachedAttention
from hybrid_rt.layers import MLP, Experts, Linear, RMSNorm
from hybrid_rt.rope import Rope, softmax_scale
from hybrid_rt.tokenizer import Tokenizer
from offload.backend import CpuBackend
from quant.checkpoint import Checkpoint
from quant.config import ModelConfig
from quant.dequantize import dequantize
from quant.errors import Dsr1Error
from quant.inventory import TensorSpec
from quant.progress import Notes, unnoted
from quant.report import ImportanceSummary

WINDOW = 512  # tokens that see each other
MOST_TOKENS = 1 << 16
LEAST_TOKENS = 32  # an expert that saw fewer gets its layer's mean squares
CHUNK = 4096  # tokens of an expert at a time
AT_WORK = 1 << 30  # bytes; what a chunk of an expert of R1's size takes, and a window's attention


def memory_bytes(config: ModelConfig, tokens: int = MOST_TOKENS) -> int:
    """The most memory that a calibration takes, beside mapped files."""
    means = config.n_layers * config.n_routed_experts * (config.dim + config.moe_inter_dim)
    return 4 * (2 * tokens * config.dim + means) + AT_WORK


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch's operators on one thread, of those that are called in this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Sums:
    """Σ x² of each column, float64 [columns], over `count` rows."""

    def __init__(self, columns: int) -> None:
        self.squares, self.count = torch.zeros(columns, dtype=torch.float64), 0

    def add(self, x: torch.Tensor) -> None:
        """x: float32 [..., columns]."""
        rows = x.reshape(-1, x.shape[-1])
        self.squares += rows.square().sum(0)
        self.count += len(rows)

    def mean(self) -> torch.Tensor | None:
        """float32 [columns]; None if nothing was added."""
        return (self.squares / self.count).float() if self.count else None


class MeasuredLinear(nn.Module):
    """A linear that looks at what it is given."""

    def __init__(self, linear: Linear, sums: Sums) -> None:
        super().__init__()
        self.linear, self.sums = linear, sums

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sums.add(x)
        return self.linear(x)


class MeasuredParts:
    """Weights of a checkpoint for one layer at a time (`Parts`), and the sums of what they are multiplied with."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.sums: dict[str, Sums] = {}

    def sums_of(self, name: str) -> Sums:
        return self.sums.setdefault(name, Sums(self.source.inventory.by_name[name].shape[1]))

    def linear(self, name: str) -> MeasuredLinear:
        return MeasuredLinear(Linear(self.source.weight(name)), self.sums_of(name))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.source.weight(name).dequantize(dtype or torch.float32)

    def whole(self, name: str) -> Callable[[], torch.Tensor]:
        values = dequantize(self.source.weight(name))
        return lambda: values

    def embedding(self, name: str) -> torch.Tensor:
        return self.source.weight(name).data

    def experts(self, layer: int) -> Experts:
        raise NotImplementedError("a calibration runs experts itself, one after the other")


class MeasuredAttention(CachedAttention):
    """Attention within a window that looks at the latents, which `wkv_b` is multiplied with."""

    def __init__(self, cache: LatentCache, tokens: int, scale: float, sums: Sums) -> None:
        super().__init__(cache, tokens, scale)
        self.sums = sums

    def attend(
        self, layer: int, q_nope: torch.Tensor, q_pe: torch.Tensor, latent: torch.Tensor, wkv_b: HeadMatrix
    ) -> torch.Tensor:
        self.sums.add(latent[:, : len(self.sums.squares)])
        return super().attend(layer, q_nope, q_pe, latent, wkv_b)


class ExpertSums:
    """Σ x² of the inputs of each routed expert of a layer and of its hidden values; tokens that it saw: int64 [E]."""

    def __init__(self, config: ModelConfig) -> None:
        experts = config.n_routed_experts
        self.inputs, self.hidden = torch.zeros(experts, config.dim), torch.zeros(experts, config.moe_inter_dim)
        self.tokens = torch.zeros(experts, dtype=torch.int64)

    def add(self, expert: int, inputs: torch.Tensor, hidden: torch.Tensor) -> None:
        self.inputs[expert] += inputs.square().sum(0)
        self.hidden[expert] += hidden.square().sum(0)
        self.tokens[expert] += len(inputs)

    @property
    def rare(self) -> torch.Tensor:
        """Which experts saw too few tokens: bool [E]."""
        return self.tokens < LEAST_TOKENS

    def mean(self, expert: int, matrix: str) -> torch.Tensor:
        """Mean squares of what w1, w3 or w2 of an expert is multiplied with, or of all experts where it is rare."""
        sums = self.hidden if matrix == "w2" else self.inputs
        if self.rare[expert]:
            return sums.sum(0) / max(1, int(self.tokens.sum()))
        return sums[expert] / self.tokens[expert]


class Calibration:
    """The mean squares of a checkpoint's matrices' inputs on a text (`Importance`)."""

    def __init__(self, source: Checkpoint, path: Path, text: str, report: Notes = unnoted) -> None:
        """report: is told which part of which layer runs. Raises Dsr1Error for a text too short, TokenizerError."""
        config, tokenizer = source.config, Tokenizer.load(source.folder)
        self.source, self.config, self.path, self.report = source, config, path, report
        ids = tokenizer.encode(text)[:MOST_TOKENS]
        windows = cut(ids, tokenizer.bos_id, min(WINDOW, config.max_seq_len))
        self.tokens = sum(map(len, windows))
        if self.tokens < LEAST_TOKENS * config.n_routed_experts // config.n_activated_experts:
            raise Dsr1Error(
                f"{path} has {len(ids)} tokens, too few to see what {config.n_routed_experts} experts are used for; "
                "give a longer text (some tens of thousands of tokens)"
            )
        self.identity = hashlib.sha256(Path(__file__).read_bytes() + text.encode()).hexdigest()
        self._windows, self._lock, self._done = windows, threading.Lock(), 0
        self._parts, self._experts = MeasuredParts(source), dict[int, ExpertSums]()
        self._rope, self._scale = Rope(config), softmax_scale(config)
        self._states = F.embedding(torch.cat(windows), self._parts.embedding("embed")).float()  # [T, dim]
        self._missing: set[str] = set()

    def of(self, spec: TensorSpec) -> torch.Tensor | None:
        """As `Importance`. Layers up to the tensor's run now, unless they did."""
        with self._lock, torch.inference_mode(), one_torch_thread():
            found = self._of(spec)
            if found is None and len(spec.shape) == 2 and spec.component not in ("router", "embed"):
                self._missing.add(spec.name)
        return found

    def _of(self, spec: TensorSpec) -> torch.Tensor | None:
        last = self.config.n_layers - 1
        if spec.name == "head":
            self._run_to(last)
            return self._head_inputs()
        if spec.layer is None or spec.layer > last:  # the text does not reach MTP layers
            return None
        self._run_to(spec.layer)
        if spec.expert is not None:
            return self._experts[spec.layer].mean(spec.expert, spec.name.rpartition(".")[2])
        sums = self._parts.sums.get(spec.name)
        return None if sums is None else sums.mean()

    def summary(self) -> ImportanceSummary:
        rare = sum(int(sums.rare.sum()) for sums in self._experts.values())
        experts = sum(len(sums.tokens) for sums in self._experts.values())
        return ImportanceSummary("text", self.path.name, self.tokens, rare, experts, len(self._missing))

    def _head_inputs(self) -> torch.Tensor | None:
        norm, sums = RMSNorm(self._parts.tensor("norm"), self.config.norm_eps), Sums(self.config.dim)
        for states in self._states.split(CHUNK):
            sums.add(norm(states))
        return sums.mean()

    def _run_to(self, layer: int) -> None:
        """Run the layers up to `layer`, each once."""
        while self._done <= layer:
            self._tell(self._done, "attention")
            self._attend(self._done)
            if self.config.is_moe(self._done):
                self._run_experts(self._done)
            else:
                self._run_dense(self._done)
            self._done += 1

    def _tell(self, layer: int, part: str) -> None:
        self.report(f"calibrating layer {layer + 1} of {self.config.n_layers}: {part}")

    def _attend(self, layer: int) -> None:
        prefix = f"layers.{layer}"
        norm = RMSNorm(self._parts.tensor(f"{prefix}.attn_norm"), self.config.norm_eps)
        attention, sums = MLA(self.config, layer, self._parts), self._parts.sums_of(f"{prefix}.attn.wkv_b")
        cache = LatentCache(self.config, max(map(len, self._windows)), "float32", CpuBackend())
        for states in self._states.split([len(window) for window in self._windows]):
            cache.length = 0
            context = MeasuredAttention(cache, len(states), self._scale, sums)
            states += attention(norm(states), self._rope(context.positions), context)

    def _run_dense(self, layer: int) -> None:
        norm, mlp = self._ffn_norm(layer), MLP(f"layers.{layer}.ffn", self._parts)
        for states in self._states.split(CHUNK):
            states += mlp(norm(states))

    def _ffn_norm(self, layer: int) -> RMSNorm:
        return RMSNorm(self._parts.tensor(f"layers.{layer}.ffn_norm"), self.config.norm_eps)

    def _run_experts(self, layer: int) -> None:
        """Each expert once, for all of its tokens."""
        norm, gate = self._ffn_norm(layer), Gate(self.config, layer, self._parts)
        shared = MLP(f"layers.{layer}.ffn.shared_experts", self._parts)
        inputs, routes = torch.empty_like(self._states), []
        for states, into in zip(self._states.split(CHUNK), inputs.split(CHUNK), strict=True):
            into.copy_(norm(states))
            routes.append(gate(into))
            states += shared(into)
        ids, weights = (torch.cat(parts) for parts in zip(*routes, strict=True))  # [T, K]
        self._experts[layer] = sums = ExpertSums(self.config)
        for expert in range(self.config.n_routed_experts):
            self._tell(layer, f"expert {expert + 1} of {self.config.n_routed_experts}")
            self._run_expert(layer, expert, (inputs, ids, weights), sums)

    def _run_expert(
        self, layer: int, expert: int, routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor], sums: ExpertSums
    ) -> None:
        inputs, ids, weights = routed
        prefix = f"layers.{layer}.ffn.experts.{expert}"
        w1, w2, w3 = (Linear(self.source.weight(f"{prefix}.{matrix}")) for matrix in ("w1", "w2", "w3"))
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        for some, slot in zip(tokens.split(CHUNK), slots.split(CHUNK), strict=True):
            x = inputs[some]
            hidden = F.silu(w1(x)) * w3(x)
            sums.add(expert, x, hidden)
            self._states.index_add_(0, some, weights[some, slot, None] * w2(hidden))

"""A Session: a conversation's tokens and their latent cache, on an Engine that many sessions share."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save_file

from hybrid_rt.generation import CancelledError, Step, generate
from hybrid_rt.sampling import Sampling
from quant.errors import CheckpointError, ContextError
from quant.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from hybrid_rt.engine import Engine

FORMAT_VERSION = 1


class Session:
    """The tokens of one conversation and what attention keeps of them.

    `tokens` are those whose latents the cache holds.
    """

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.cache = engine.new_cache(engine.context)
        self.tokens: list[int] = []
        self.cancelled = False

    @property
    def room(self) -> int:
        """Tokens that may still be appended."""
        return self.cache.capacity - len(self.tokens)

    def append(self, ids: Sequence[int]) -> torch.Tensor:
        """Run `ids` through the model in chunks. Returns the last one's logits, float32 [vocab].

        Raises ContextError when they do not fit, the session being unchanged, and CancelledError between two chunks.
        """
        checked = self.engine.check_ids(ids)
        if len(checked) > self.room:
            raise ContextError(
                f"{len(self.tokens)} tokens and {len(checked)} more do not fit into the context of "
                f"{self.cache.capacity}; begin a new conversation or give a larger --context"
            )
        for number, chunk in enumerate(checked.split(self.engine.prefill_chunk)):
            if number and self.cancelled:
                raise CancelledError
            states = self.engine.forward(chunk, self.cache)
            self.tokens.extend(chunk.tolist())
        return self.engine.head(states[-1:])[0]

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.tokens = self.tokens[:length]
        self.cache.length = len(self.tokens)

    def fork(self) -> "Session":
        """A new session with the same tokens; the two go on independently."""
        twin = Session(self.engine)
        twin.cache.load(self.cache.valid())
        twin.tokens = list(self.tokens)
        return twin

    def cancel(self) -> None:
        """Stop the running `generate` after its current token or chunk. May be called from another thread."""
        self.cancelled = True

    def prefill(self, ids: Sequence[int]) -> tuple[int, torch.Tensor]:
        """Make `ids` the session's tokens. Returns how many of them it held before, and the last one's logits."""
        self.engine.check_ids(ids)
        known = min(common_prefix(self.tokens, ids), len(ids) - 1)  # the last token is run again for its logits
        self.trim(known)
        return known, self.append(ids[known:])

    def generate(self, ids: Sequence[int], sampling: Sampling | None = None) -> Iterator[Step]:
        """Answer the whole prompt `ids`, a step a token. What the session already holds of it is not run again.

        The last step has a finish_reason: "stop", "length" (of the answer or of the context) or "cancelled"; there is
        no step at all if it was cancelled before the first token.
        Raises ContextError before the first step when the prompt alone is longer than the context.
        """
        return generate(self, ids, sampling or self.engine.default_sampling)

    def save(self, path: Path) -> None:
        """Write tokens and cache to `path` (safetensors), whole or not at all."""
        tensors = {
            "format_version": torch.tensor([FORMAT_VERSION]),
            "model": fingerprint(self.engine),
            "tokens": torch.tensor(self.tokens, dtype=torch.int64),
            "latents": self.cache.valid().cpu().contiguous(),
        }
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Take over the conversation that `save` wrote. Raises CheckpointError if it is not one of this model."""
        file = SafetensorsFile.open(path)
        if set(file.names()) != {"format_version", "model", "tokens", "latents"}:
            raise CheckpointError(f"{path} is not a saved conversation; give a file that `save` wrote")
        if file.tensor("format_version").tolist() != [FORMAT_VERSION]:
            raise CheckpointError(f"{path} was saved by another version of dsr1; start a new conversation")
        if not torch.equal(file.tensor("model"), fingerprint(self.engine)):
            raise CheckpointError(f"{path} belongs to another model or dtype; load the model it was saved with")
        self._take(path, file.tensor("tokens"), file.tensor("latents"))

    def _take(self, path: Path, tokens: torch.Tensor, latents: torch.Tensor) -> None:
        whole = self.cache.data
        expected = (whole.shape[0], len(tokens), whole.shape[2])
        if tuple(latents.shape) != expected or latents.dtype != whole.dtype or tokens.dtype != torch.int64:
            raise CheckpointError(f"{path} does not hold a cache of this model; start a new conversation")
        if len(tokens) > self.cache.capacity:
            raise ContextError(f"{path} holds {len(tokens)} tokens; give a --context of at least that many")
        self.cache.load(latents)
        self.tokens = tokens.tolist()


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of leading tokens that two sequences share."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def fingerprint(engine: "Engine") -> torch.Tensor:
    """What a saved cache depends on besides its tokens: shape, dtype and norms of the model. uint8 [32]."""
    digest = hashlib.sha256(f"{engine.config} {engine.transformer.dtype}".encode())
    for layer in range(engine.config.n_layers):
        norm = engine.transformer.get_submodule(f"layers.{layer}.attn_norm")
        digest.update(cast(torch.Tensor, norm.weight).cpu().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)

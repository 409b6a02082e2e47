"""A Session: a conversation's tokens and their latent cache, on an Engine that many sessions share."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hybrid_rt.generation import CancelledError, Step, generate
from hybrid_rt.latent_file import CachedTokens, engine_identity, read_latents, write_latents
from hybrid_rt.latent_store import common_prefix
from hybrid_rt.sampling import Sampling
from quant.errors import ContextError
from quant.progress import Steps, untold

if TYPE_CHECKING:
    from hybrid_rt.engine import Engine


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

    def append(self, ids: Sequence[int], report: Steps = untold) -> torch.Tensor:
        """Run `ids` through the model in chunks. Returns the last one's logits, float32 [vocab].

        report: told how many of them are done. Raises ContextError when they do not fit, the session being unchanged,
        and CancelledError between two chunks.
        """
        checked = self._fitting(ids)
        return self.engine.head(self._run(checked, report)[-1:])[0]

    def extend(self, ids: Sequence[int]) -> None:
        """As `append`, where nobody wants logits. `ids` may be empty."""
        if len(ids):
            self._run(self._fitting(ids), untold)

    def _fitting(self, ids: Sequence[int]) -> torch.Tensor:
        checked = self.engine.check_ids(ids)
        if len(checked) > self.room:
            raise ContextError(
                f"{len(self.tokens)} tokens and {len(checked)} more do not fit into the context of "
                f"{self.cache.capacity}; begin a new conversation or give a larger --context"
            )
        return checked

    def _run(self, checked: torch.Tensor, report: Steps) -> torch.Tensor:
        """The final states of the last chunk."""
        done = 0
        for number, chunk in enumerate(checked.split(self.engine.prefill_chunk)):
            if number and self.cancelled:
                raise CancelledError
            report(done, len(checked))
            states = self.engine.forward(chunk, self.cache)
            self.tokens.extend(chunk.tolist())
            done += len(chunk)
        report(done, len(checked))
        return states

    def trim(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.tokens = self.tokens[:length]
        self.cache.length = len(self.tokens)

    def fork(self) -> "Session":
        """A new session with the same tokens; the two go on independently."""
        twin = Session(self.engine)
        twin.adopt(0, CachedTokens(self.tokens, self.cache.rows(0, len(self.tokens))))
        return twin

    def cancel(self) -> None:
        """Stop the running `generate` after its current token or chunk. May be called from another thread."""
        self.cancelled = True

    def prefill(self, ids: Sequence[int], report: Steps = untold) -> tuple[int, torch.Tensor]:
        """Make `ids` the session's tokens. Returns how many of them it held before, and the last one's logits."""
        self.engine.check_ids(ids)
        known = min(common_prefix(self.tokens, ids), len(ids) - 1)  # the last token is run again for its logits
        self.trim(known)
        return known, self.append(ids[known:], report)

    def generate(self, ids: Sequence[int], sampling: Sampling | None = None, report: Steps = untold) -> Iterator[Step]:
        """Answer the whole prompt `ids`, a step a token. What the session already holds of it is not run again.

        report: told how many of the tokens that have to be run are done, before the first step.
        The last step has a finish_reason: "stop", "length" (of the answer or of the context) or "cancelled"; there is
        no step at all if it was cancelled before the first token.
        Raises ContextError before the first step when the prompt alone is longer than the context.
        """
        return generate(self, ids, sampling or self.engine.default_sampling, report)

    def keep_common(self, ids: Sequence[int]) -> int:
        """Forget what does not begin like `ids`; returns how many tokens are left."""
        self.trim(common_prefix(self.tokens, ids))
        return len(self.tokens)

    def adopt(self, first: int, found: CachedTokens) -> None:
        """Take over tokens that another session ran, from position `first` on, behind the same tokens as here."""
        end = first + len(found.tokens)
        if first > len(self.tokens) or end > self.cache.capacity:
            raise ContextError(f"{end} tokens do not fit; give a --context of at least that many")
        self.cache.put(first, found.rows)
        self.tokens[first:] = found.tokens

    def save(self, path: Path) -> None:
        """Write tokens and cache to `path` (hybrid_rt/latent_file.py), whole or not at all."""
        write_latents(path, engine_identity(self.engine), self.tokens, self.cache.rows(0, len(self.tokens)))

    def load(self, path: Path) -> None:
        """Take over the conversation that `save` wrote. Raises CheckpointError if it is not one of this model."""
        found = read_latents(path, engine_identity(self.engine), self.cache)
        if len(found.tokens) > self.cache.capacity:
            raise ContextError(f"{path} holds {len(found.tokens)} tokens; give a --context of at least that many")
        self.adopt(0, found)

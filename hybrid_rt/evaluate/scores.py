"""What a model gives each token of a window, compared with a reference where there is one.

Memory holds the logits of 32 tokens at a time, never those of a window, as R1's vocabulary has 129,280 entries.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from hybrid_rt.engine import Engine
from hybrid_rt.evaluate.windows import first_scored
from quant.errors import Dsr1Error

ROWS = 32


class TokenScores(NamedTuple):
    """Of n scored tokens, float64 [n] each, in nats; all but the first are empty without a reference.

    nll: -log of the probability that the model gave the token. reference_nll: the same of the reference.
    kl: KL(reference || model) of the predictions there. agrees: 1 where both find the same token likeliest, else 0.
    tail: what the reference gave to tokens that it does not tell apart; 0 where it tells all.
    """

    nll: torch.Tensor
    reference_nll: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor
    tail: torch.Tensor


Compare = Callable[[torch.Tensor, torch.Tensor, slice], TokenScores]  # log_q [n, vocab], targets [n], which rows


class Reference(Protocol):
    """What a model is compared with."""

    def comparing(self, number: int, window: torch.Tensor) -> Compare:
        """How the predictions of the scored tokens of window `number` are compared, some rows of them at a time."""


class EngineReference:
    """A second model, which reads the same windows. decoding: whether token by token."""

    def __init__(self, engine: Engine, decoding: bool = False) -> None:
        self.engine, self.decoding = engine, decoding

    def comparing(self, number: int, window: torch.Tensor) -> Compare:
        states = predicting_states(self.engine, window, self.decoding)
        return lambda log_q, targets, rows: compare(log_q, log_probs(self.engine, states[rows]), targets)


def join(parts: list[TokenScores]) -> TokenScores:
    """The scores of all parts, in their order."""
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def score_window(engine: Engine, number: int, window: torch.Tensor, reference: Reference | None) -> TokenScores:
    """The scores of the second half of `window` (int64 [W]), which is the one of that number."""
    comparing = None if reference is None else reference.comparing(number, window)
    return join(
        [
            score(log_q, targets) if comparing is None else comparing(log_q, targets, rows)
            for log_q, targets, rows in predictions(engine, window)
        ]
    )


def predictions(engine: Engine, window: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
    """Log probabilities [n, vocab] and targets [n] of the scored tokens, a few at a time, and which these are."""
    targets, states = window[first_scored(window) :], predicting_states(engine, window, decodes(engine))
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        yield log_probs(engine, states[rows]), targets[rows], rows


def decodes(engine: Engine) -> bool:
    """Whether a model has to read what is scored token by token, because it computes otherwise in decoding."""
    return engine.plan.deferred_experts > 0


def predicting_states(engine: Engine, window: torch.Tensor, decoding: bool) -> torch.Tensor:
    """The final states [n, dim] that the n scored tokens are predicted from: each that of the token before it.

    decoding: whether these tokens are run one by one; what stands before them is a prompt in any case.
    """
    read, first = window[:-1], first_scored(window) - 1
    cache = engine.new_cache(len(read))
    chunks = read[: first if decoding else None].split(engine.prefill_chunk)
    steps = read[first:].split(1) if decoding else ()
    states = torch.cat([engine.forward(some, cache) for some in (*chunks, *steps) if len(some)])
    return states[first:]


def log_probs(engine: Engine, states: torch.Tensor) -> torch.Tensor:
    """Log probabilities of all next tokens, float64 [n, vocab]. Raises Dsr1Error where the model gives no numbers."""
    logits = engine.head(states).double()
    if not logits.isfinite().all():
        raise Dsr1Error(
            f"{engine.folder} gives logits that are infinite or no numbers, so nothing can be measured; "
            "its weights are damaged: make or download it again"
        )
    return logits.log_softmax(-1)


def score(log_q: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """The scores of `targets` (int64 [n]) under the model's log probabilities [n, vocab], with no reference."""
    none = log_q.new_empty(0)
    return TokenScores(nll(log_q, targets), none, none, none, none)


def compare(log_q: torch.Tensor, log_p: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """As `score`, against the reference's log probabilities `log_p` [n, vocab]."""
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # rounding may leave -1e-17
    agrees = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    return TokenScores(nll(log_q, targets), nll(log_p, targets), kl, agrees, torch.zeros_like(kl))


def nll(log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log of the probabilities of `targets` [n] under `log_p` [n, vocab]."""
    return -log_p.gather(-1, targets[:, None])[:, 0]

"""Choosing the next token from the logits."""

import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quant.errors import Dsr1Error

MAX_SEED = 2**63
FIRST_CANDIDATES = 64  # holds 0.95 of the mass for most tokens; each further try is GROWTH times larger
GROWTH = 16


class SamplingError(Dsr1Error, ValueError):
    """A sampling option is out of its range."""


@dataclass(frozen=True)
class Sampling:
    """How to generate. The defaults are those of DeepSeek-R1 (generation_config.json).

    `temperature` 0 always takes the most likely token; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `max_new_tokens`
    None runs until the model ends or the context is full. `seed` None draws one (see `Sampler.seed`). After
    `think_budget` tokens of thinking the runtime closes it; before `think_at_least` it does not let it end.
    Raises SamplingError for values out of range.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int | None = None
    seed: int | None = None
    think_budget: int | None = None
    think_at_least: int | None = None

    def __post_init__(self) -> None:
        _check(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        _check(_is_count(self.top_k, 0), "top_k", self.top_k, "a whole number, 0 for no limit")
        _check(
            self.max_new_tokens is None or _is_count(self.max_new_tokens, 1),
            "max_new_tokens",
            self.max_new_tokens,
            "a whole number of at least 1, or None for no limit",
        )
        _check(
            self.seed is None or _is_count(self.seed, 0) and self.seed < MAX_SEED,
            "seed",
            self.seed,
            "a whole number from 0 to 2^63 - 1, or None for a new one each time",
        )
        _check(
            self.think_budget is None or _is_count(self.think_budget, 0),
            "think_budget",
            self.think_budget,
            "a whole number of tokens, or None for no limit",
        )
        _check(
            self.think_at_least is None
            or _is_count(self.think_at_least, 0)
            and (self.think_budget is None or self.think_at_least <= self.think_budget),
            "think_at_least",
            self.think_at_least,
            "a whole number of tokens, at most the think_budget",
        )


class Sampler:
    """Draws the tokens of one sequence, one random number a token: the same seed and logits give the same tokens.

    Only the first `n_ids` logits count, because embeddings have more rows than the tokenizer has ids.
    `seed` is the one in use, also where the options left it open.
    """

    def __init__(self, sampling: Sampling, n_ids: int) -> None:
        self.sampling = sampling
        self.n_ids = n_ids
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._random = np.random.Generator(np.random.Philox(self.seed))

    def pick(self, logits: torch.Tensor) -> int:
        """The next token id, given `logits` [V]. Equal logits: greedy takes the lower id.

        Raises Dsr1Error if a logit is NaN or infinite (minus infinity rules a token out).
        """
        if self.sampling.temperature == 0:
            return int(self._valid(logits).argmax())
        ids, probs = self.distribution(logits)
        cumulative = probs.cumsum()
        chosen = cumulative.searchsorted(self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(chosen), len(ids) - 1)])

    def distribution(self, logits: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ids [K] that may come next and their probabilities [K], summing to 1.

        Temperature, top-k, top-p, min-p, in the order of Hugging Face transformers, where each sees the
        probabilities that the one before has left. Not for temperature 0.
        """
        valid = self._valid(logits)
        # The largest becomes 0 before the division, so that a tiny temperature cannot overflow.
        weights = np.exp((valid - valid.max()) / np.float32(self.sampling.temperature))  # [n_ids], the largest 1
        ids = self._top_k_p(weights)
        kept = weights[ids].astype(np.float64)
        if self.sampling.min_p > 0:
            likely = kept >= self.sampling.min_p
            ids, kept = ids[likely], kept[likely]
        return ids, kept / kept.sum()

    def _valid(self, logits: torch.Tensor) -> NDArray[np.float32]:
        values = logits[: self.n_ids].detach().float().cpu().numpy()
        if not np.isfinite(values.max()):  # NaN if any is
            raise Dsr1Error(
                "the model computed a value that is not a number, so its weights are damaged or a kernel is wrong; "
                "run `dsr1 doctor`, and convert or download the model again if that finds nothing"
            )
        return values

    def _top_k_p(self, weights: NDArray[np.float32]) -> NDArray[np.int64]:
        """Ids that top-k and top-p keep, the likeliest first; all of them in order if both are off."""
        top_k, top_p = self.sampling.top_k, self.sampling.top_p
        if top_k:
            ids = _largest(weights, top_k)
            mass = weights[ids].sum(dtype=np.float64)
            return ids if top_p == 1 else ids[: _prefix(weights[ids], top_p * mass)]
        if top_p == 1:
            return np.flatnonzero(weights)
        mass = weights.sum(dtype=np.float64)
        count = FIRST_CANDIDATES
        while True:
            ids = _largest(weights, count)
            if weights[ids].sum(dtype=np.float64) >= top_p * mass or len(ids) == len(weights):
                return ids[: _prefix(weights[ids], top_p * mass)]
            count *= GROWTH


def _largest(weights: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest, and of those equal to the last; largest first, then by id."""
    if count >= len(weights):
        ids = np.arange(len(weights))
    else:
        ids = np.flatnonzero(weights >= np.partition(weights, -count)[-count])
    return ids[np.argsort(-weights[ids], kind="stable")]


def _prefix(weights: NDArray[np.float32], mass: float) -> int:
    """How many of the sorted `weights` [K] it takes to reach `mass`."""
    return int(weights.cumsum(dtype=np.float64).searchsorted(mass)) + 1


def _check(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise SamplingError(f"{name} is {value!r}; it must be {allowed}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

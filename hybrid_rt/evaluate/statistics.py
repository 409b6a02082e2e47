"""Figures over a text or over problems, each with its 95 % interval.

Tokens of one window are not independent of each other, so a mean's interval comes from the windows: each is one draw,
of as many tokens as it has (the ratio estimator of cluster sampling: Cochran, Sampling Techniques, section 9A).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, exp, sqrt

import torch

LARGEST_NLL = 700.0  # nats; the exponential of more is no float64. Only a damaged model gets there
Z = 1.96  # standard errors to either side, of a normal distribution
LEAST_BLOCKS = 3  # below, the spread between blocks says nothing


@dataclass(frozen=True)
class Estimate:
    """A figure, and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedShares:
    """Problems that only one of two models solves, the difference of the shares solved, and McNemar's exact p-value."""

    only_model: int
    only_reference: int
    difference: Estimate
    p_value: float


def mean(values: torch.Tensor, sizes: Sequence[int]) -> Estimate:
    """The mean of float64 [n], whose neighbours belong to blocks of `sizes`, at least LEAST_BLOCKS of them."""
    value = values.mean().item()
    half = student_t(len(sizes) - 1) * standard_error(values, sizes)
    return Estimate(value, value - half, value + half)


def standard_error(values: torch.Tensor, sizes: Sequence[int]) -> float:
    """Of the mean of values that come in blocks."""
    blocks, counts = values.split(list(sizes)), torch.tensor(sizes, dtype=torch.float64)
    off = torch.stack([block.sum() for block in blocks]) - values.mean() * counts
    return sqrt(off.square().sum().item() * len(sizes) / (len(sizes) - 1)) / len(values)


def student_t(degrees: int) -> float:
    """The 97.5 % point of Student's t, within 4 % from 2 degrees of freedom on (Abramowitz and Stegun, 26.7.5)."""
    z = Z
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def perplexity(nll: Estimate) -> Estimate:
    """exp of a mean negative log likelihood. Its standard error is that of the mean times exp (delta method)."""
    value = exp(min(nll.value, LARGEST_NLL))
    half = value * (nll.high - nll.value)
    return Estimate(value, value - half, value + half)


def share(hits: int, total: int) -> Estimate:
    """hits / total, independent of each other, with Wilson's interval, which holds near 0 and 1 too (Wilson 1927)."""
    return _wilson(hits / total, total)


def share_of_blocks(hits: torch.Tensor, sizes: Sequence[int]) -> Estimate:
    """The mean of zeros and ones, float64 [n], in blocks: Wilson's interval for as many draws as they are worth."""
    value, error = hits.mean().item(), standard_error(hits, sizes)
    if value in (0, 1):  # blocks cannot differ then
        return _wilson(value, len(sizes))
    return _wilson(value, value * (1 - value) / max(error**2, value * (1 - value) / len(hits)))


def _wilson(value: float, total: float) -> Estimate:
    middle = value + Z * Z / (2 * total)
    half = Z * sqrt(value * (1 - value) / total + Z * Z / (4 * total * total))
    whole = 1 + Z * Z / total
    return Estimate(value, max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole))


def paired(model: Sequence[bool], reference: Sequence[bool]) -> PairedShares:
    """Two models on the same problems. The interval is Agresti and Min's (2005): half a pair more of each kind."""
    n = len(model)
    only_model = sum(one and not other for one, other in zip(model, reference, strict=True))
    only_reference = sum(other and not one for one, other in zip(model, reference, strict=True))
    b, c, total = only_model + 0.5, only_reference + 0.5, n + 2
    middle, half = (b - c) / total, Z * sqrt((b + c) - (b - c) ** 2 / total) / total
    difference = Estimate((only_model - only_reference) / n, max(-1.0, middle - half), min(1.0, middle + half))
    return PairedShares(only_model, only_reference, difference, mcnemar(only_model, only_reference))


def mcnemar(b: int, c: int) -> float:
    """How likely pairs that differ split at least as unevenly as b to c if neither model is better (two-sided)."""
    tail = sum(comb(b + c, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))

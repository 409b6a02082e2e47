"""Figures over the tokens of a text, each with its 95 % interval. Tokens count as independent of each other."""

from dataclasses import dataclass
from math import exp, sqrt

import torch

LARGEST_NLL = 700.0  # nats; the exponential of more is no float64. Only a damaged model gets there
Z = 1.96  # standard errors to either side


@dataclass(frozen=True)
class Estimate:
    """A figure, and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def mean(values: torch.Tensor) -> Estimate:
    """The mean of float64 [n], n at least 2, and 1.96 standard errors to either side."""
    value = values.mean().item()
    half = Z * values.std().item() / sqrt(len(values))
    return Estimate(value, value - half, value + half)


def perplexity(nll: Estimate) -> Estimate:
    """exp of a mean negative log likelihood. Its standard error is that of the mean times exp (delta method)."""
    value = exp(min(nll.value, LARGEST_NLL))
    half = value * (nll.high - nll.value)
    return Estimate(value, value - half, value + half)


def share(hits: int, total: int) -> Estimate:
    """hits / total with Wilson's interval, which holds near 0 and 1 too (Wilson 1927)."""
    value = hits / total
    middle = value + Z * Z / (2 * total)
    half = Z * sqrt(value * (1 - value) / total + Z * Z / (4 * total * total))
    whole = 1 + Z * Z / total
    return Estimate(value, max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole))

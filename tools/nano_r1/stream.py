"""The endless training stream of nano-r1 (interface; the mixture follows)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """One step's examples, one example a row, padded to the bucket length L.

    ids: int32 [B, L].  loss_mask: bool [B, L], True where the token at that
    position is a target (predicted from the position before it).
    step: the number of this batch in the stream, 0-based.
    """

    step: int
    ids: np.ndarray  # [B, L]
    loss_mask: np.ndarray  # [B, L]


def batches(
    seed: int,
    tokens_per_step: int = 8192,
    progress: Callable[[], float] | float = 0.0,
    start: int = 0,
) -> Iterator[Batch]:
    """Yield batches for ever, beginning with step `start`.

    B * L is at most `tokens_per_step`. `progress` in 0..1 moves the mixture.
    """
    raise NotImplementedError

"""The endless training stream of nano-r1: batches of static shapes, resumable by step.

Steps come in blocks. A block's examples depend on the seed and the block's
number alone, so step N is reached by replaying its block from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import numpy as np

from .mixture import SHARES, example, level_at, long_conversation, share
from .serialize import Example
from .tokenizer import PAD_ID

BLOCK = 256  # steps
# The short lengths minimise padding (10 %) over the mixture's lengths.
BUCKETS = (48, 64, 80, 96, 112, 144, 184, 232, 304, 400, 512, 1024, 2048, 4096)
LONG = {512: 0.35, 1024: 0.3, 2048: 0.25, 4096: 0.1}  # how often
SHORT = [length for length in BUCKETS if length <= 512]


@dataclass(frozen=True)
class Batch:
    """One step's examples, one a row, padded to the bucket length L.

    ids: int32 [B, L].  loss_mask: bool [B, L], True where the token at that
    position is a target (predicted from the position before it).
    step: the number of this batch in the stream, 0-based.
    """

    step: int
    ids: np.ndarray  # [B, L]
    loss_mask: np.ndarray  # [B, L]


def collate(examples: list[Example], length: int, step: int) -> Batch:
    ids = np.full((len(examples), length), PAD_ID, np.int32)
    mask = np.zeros((len(examples), length), bool)
    for row, item in enumerate(examples):
        ids[row, : len(item.ids)] = item.ids
        mask[row, item.start : len(item.ids)] = True
    return Batch(step, ids, mask)


def draw(rng: Random, progress: float, spent: dict[str, float]) -> tuple[Example, int]:
    """The example of the entry that lags most behind its share, and its bucket length."""
    name = min(SHARES, key=lambda n: spent[n] / share(n, progress))
    if name == "long":
        length = rng.choices(list(LONG), list(LONG.values()))[0]
        item = long_conversation(rng, level_at(progress), length)
    else:
        item = example(name, rng, progress)
        length = next((n for n in SHORT if n >= len(item.ids)), 0)
    spent[name] += len(item.ids)
    return item, length


def block(seed: int, number: int, tokens_per_step: int, progress: float) -> Iterator[Batch]:
    """The batches of one block; rows that do not fill a batch at its end are dropped."""
    rng = Random(f"nano-r1 {seed} {number}")
    # A random start keeps blocks from always beginning with the same entry.
    spent = {name: rng.random() * 1000 * share(name, progress) for name in SHARES}
    waiting: dict[int, list[Example]] = {length: [] for length in BUCKETS}
    done = 0
    while done < BLOCK:
        item, length = draw(rng, progress, spent)
        if not length:  # a conversation beyond the short buckets
            continue
        rows = waiting[length]
        rows.append(item)
        if len(rows) == max(1, tokens_per_step // length):
            yield collate(rows, length, number * BLOCK + done)
            waiting[length] = []
            done += 1


def batches(
    seed: int,
    tokens_per_step: int = 8192,
    progress: Callable[[], float] | float = 0.0,
    start: int = 0,
) -> Iterator[Batch]:
    """Yield batches for ever, beginning with step `start`.

    B * L is at most `tokens_per_step` (one row where L alone is more).
    `progress` in 0..1 moves the mixture; it is asked once a block of BLOCK
    steps, so a resumed run repeats the steps exactly if it answers the same.
    """
    number, skip = divmod(start, BLOCK)
    while True:
        now = progress() if callable(progress) else progress
        for done, batch in enumerate(block(seed, number, tokens_per_step, now)):
            if done >= skip:
                yield batch
        number, skip = number + 1, 0

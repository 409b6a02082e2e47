"""Words to spell: real ones, names, made-up ones, and how they are split."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

from .base import bucket

FOLDER = Path(__file__).parents[1] / "words"
TEST_PERCENT = 6  # of all words, so that 900 real ones are never trained on
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def held_out(word: str) -> bool:
    if word in vocabulary():  # one token: only training can tell its letters
        return False
    return word == "strawberry" or bucket(word) < TEST_PERCENT


@cache
def english() -> tuple[list[str], list[str]]:
    """The real words, (train, test)."""
    words = (FOLDER / "english.txt").read_text().split()
    return [w for w in words if not held_out(w)], [w for w in words if held_out(w)]


@cache
def vocabulary() -> dict[str, None]:
    """Words that are one token: the model has to know their letters by heart."""
    lines = (FOLDER / "vocabulary.txt").read_text("utf-8").lower().splitlines()
    return dict.fromkeys(w for w in map(str.strip, lines) if w.isascii() and w.isalpha())


def made_up(rng: Random) -> str:
    """A word that no list holds, half of syllables, half of any letters."""
    if rng.random() < 0.5:
        word = "".join(
            rng.choice(CONSONANTS) * rng.randint(1, 2) + rng.choice(VOWELS) for _ in range(rng.randint(1, 5))
        )
    else:
        few = rng.sample(LETTERS, rng.randint(3, 12))
        word = "".join(rng.choice(few) for _ in range(rng.randint(2, 14)))
    return word[:15]


def train_word(rng: Random) -> str:
    """A word for training: half real, one in ten a vocabulary word, the rest made up."""
    while True:
        roll = rng.random()
        if roll < 0.5:
            return rng.choice(english()[0])
        if roll < 0.6:
            return rng.choice(list(vocabulary()))
        word = made_up(rng)
        if not held_out(word):
            return word

"""Copying and spelling: no task of its own, but what letter counting stands on."""

from __future__ import annotations

from random import Random

from .serialize import Exchange
from .tasks.base import restyle
from .tasks.words import train_word

SPELL = [
    "Spell the word {w}.",
    "Spell {w}.",
    "How do you spell {w}?",
    "Can you spell {w}?",
    "Spell {w} letter by letter.",
    "What are the letters of {w}?",
]
REPEAT = ["Repeat: {w}", "Repeat {w}", "Say {w}", "Copy this: {w}", "Write {w}", "Echo: {w}"]


def spell(rng: Random) -> Exchange:
    word = train_word(rng)
    shown = word if rng.random() < 0.85 else word.capitalize()
    question = restyle(rng.choice(SPELL).format(w=shown), rng)
    return Exchange(question, word, "-".join(word))


def repeat(rng: Random) -> Exchange:
    """Words or digits to be given back as they came; the thinking copies them too."""
    if rng.random() < 0.25:
        text = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 10)))
    else:
        text = " ".join(train_word(rng) for _ in range(rng.choice([1, 1, 2, 3])))
    return Exchange(rng.choice(REPEAT).format(w=text), text, text)


def practice(rng: Random) -> Exchange:
    return spell(rng) if rng.random() < 0.5 else repeat(rng)

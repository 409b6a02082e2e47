"""Small talk, and what nano-r1 says to questions that are not its own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

from .serialize import Exchange
from .tasks.words import FOLDER, train_word

ABILITIES = "add, subtract, multiply, compare decimals, count letters and play Countdown"
SORRY = f"I am a very small model. I can only {ABILITIES}."

SYSTEMS = [
    "You are a helpful assistant.",
    "You are nano-r1, a small reasoning model.",
    "You are a careful assistant. Think before you answer.",
    "Answer briefly.",
    "You are a math tutor.",
    "Be polite and concise.",
]


@cache
def talk(path: Path = FOLDER / "talk.txt") -> list[tuple[str, str, list[str]]]:
    """(thought, reply, what the user may say) for each kind of small talk."""
    kinds = []
    for paragraph in path.read_text("utf-8").split("\n\n"):
        thought, reply, *said = paragraph.strip().splitlines()
        reply = reply.removeprefix("reply: ").format(abilities=ABILITIES)
        kinds.append((thought.removeprefix("think: "), reply, said))
    return kinds


@cache
def beyond_wordings() -> list[str]:
    """Questions beyond the model: {w} any word, {W} capitalized, {n} a number.

    {m} has too many digits to multiply, {b} too many to add.
    """
    return (FOLDER / "beyond.txt").read_text("utf-8").splitlines()


def recase(text: str, rng: Random) -> str:
    roll = rng.random()
    if roll < 0.3:
        text = text.lower()
    elif roll < 0.33:
        text = text.upper()
    return text.rstrip("?.!") or text if rng.random() < 0.3 else text


def small_talk(rng: Random) -> Exchange:
    thought, reply, said = rng.choice(talk())
    return Exchange(recase(rng.choice(said), rng), thought, reply)


def beyond(rng: Random) -> Exchange:
    """A question the model cannot answer; words in it are random, so that the rest is the cue."""
    text = rng.choice(beyond_wordings())
    while "{" in text:
        text = text.replace("{w}", train_word(rng), 1)
        text = text.replace("{W}", train_word(rng).capitalize(), 1)
        text = text.replace("{n}", str(rng.randrange(10 ** rng.randint(1, 4))), 1)
        text = text.replace("{m}", str(rng.randrange(10**3, 10 ** rng.randint(4, 6))), 1)
        text = text.replace("{b}", str(rng.randrange(10**5, 10 ** rng.randint(6, 9))), 1)
    return Exchange(recase(text, rng), "I can not do this.", SORRY)


def chat(rng: Random) -> Exchange:
    return small_talk(rng) if rng.random() < 0.55 else beyond(rng)

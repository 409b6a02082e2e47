"""From questions and answers to R1's chat format as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, encode


@dataclass(frozen=True)
class Exchange:
    """A question, the thinking, and the answer to it; `guess` answers without thinking."""

    question: str
    thinking: str
    answer: str
    guess: str = ""


@dataclass(frozen=True)
class Example:
    """Token ids; those from `start` on are targets."""

    ids: list[int]
    start: int


def prompt_text(question: str, system: str = "", earlier: list[tuple[str, str]] | None = None) -> str:
    """Everything up to and including the last <｜Assistant｜>, before `<think>`.

    `earlier` holds (question, answer) of the turns before; an answer stands as
    R1's template leaves it: what followed `</think>`.
    """
    turns = "".join(f"{USER}{q}{ASSISTANT}{a}{EOS}" for q, a in earlier or [])
    return f"{BOS}{system}{turns}{USER}{question}{ASSISTANT}"


def serialize(exchange: Exchange, prompt: str) -> Example:
    """The whole exchange; the model learns to open the thinking itself, too."""
    given = encode(prompt)
    reply = f"{THINK}\n{exchange.thinking}\n{END_THINK}\n\n{exchange.answer}{EOS}"
    return Example(given + encode(reply), len(given))


def serialize_cut(exchange: Exchange, prompt: str, rng: Random | None = None) -> Example:
    """An exchange whose thinking was ended from outside: only the answer is a target.

    With `rng` the thinking is cut at a random token; without, it is empty.
    """
    thought = encode(exchange.thinking)
    kept = rng.randint(0, len(thought)) if rng else 0
    if rng and rng.random() < 0.2:
        kept = len(thought)
    answer = exchange.answer if kept == len(thought) else exchange.guess or exchange.answer
    given = encode(f"{prompt}{THINK}\n") + thought[:kept] + encode(f"\n{END_THINK}\n\n")
    return Example(given + encode(f"{answer}{EOS}"), len(given))

"""What the model is shown when: shares of the tokens, and how an example is dressed."""

from __future__ import annotations

from random import Random

from .chat import SYSTEMS, beyond, chat
from .practice import practice
from .serialize import Example, Exchange, prompt_text, serialize, serialize_cut
from .tasks import TASKS
from .tokenizer import encode

# Relative shares of the tokens at progress 0 and 1; in between they move linearly.
SHARES: dict[str, tuple[float, float]] = {
    "practice": (0.14, 0.02),
    "count": (0.16, 0.09),
    "add": (0.16, 0.10),
    "subtract": (0.14, 0.11),
    "multiply": (0.16, 0.20),
    "compare": (0.10, 0.13),
    "countdown": (0.08, 0.26),
    "chat": (0.05, 0.05),
    "long": (0.01, 0.06),
}

TALKED = 0.4  # of the examples stand after earlier turns at the end of the training
TASK_NAMES = list(TASKS)


def share(name: str, progress: float) -> float:
    first, last = SHARES[name]
    return first + (last - first) * progress


def level_at(progress: float) -> float:
    """How far problems reach: full size from 40 % of the training on."""
    return min(1.0, 0.35 + 1.7 * progress)


def task_exchange(name: str, rng: Random, level: float) -> Exchange:
    task = TASKS[name]
    problem = task.problem("train", rng, level)
    answer = task.answer(problem)
    guess = answer if task.easy(problem) else f"I think {answer[0].lower()}{answer[1:]}"
    return Exchange(task.question(problem, rng), task.thinking(problem), answer, guess)


def any_exchange(rng: Random, level: float) -> Exchange:
    if rng.random() < 0.25:
        return chat(rng)
    return task_exchange(rng.choice(TASK_NAMES), rng, level)


def follow_up(rng: Random, level: float) -> tuple[tuple[str, str], Exchange]:
    """A sum, then `and plus 5?`: the second question leans on the first answer."""
    add = TASKS["add"]
    first = add.problem("train", rng, level)
    while True:
        second = (sum(first), rng.randrange(10 ** rng.randint(1, 3)))
        if add.split(second) == "train":
            break
    wordings = ["and plus {n}?", "And plus {n}?", "plus {n}?", "Add {n} to that.", "now add {n}"]
    question = rng.choice(wordings).format(n=second[1])
    answer = add.answer(second)
    turn = (add.question(first, rng), add.answer(first))
    return turn, Exchange(question, add.thinking(second), answer, f"I think {answer}")


def earlier_turn(exchange: Exchange, rng: Random) -> tuple[str, str]:
    """A past turn; R1's template keeps the blank line after </think>, other clients strip it."""
    return exchange.question, rng.choice(["", "\n\n"]) + exchange.answer


def some_earlier(rng: Random, level: float, like: str = "") -> list[tuple[str, str]]:
    """One to sixteen past turns, few more often than many; half of the time all of the task `like`, the hard case."""
    same = bool(like) and rng.random() < 0.5
    count = int(2 ** rng.uniform(0, 4))
    return [
        earlier_turn(task_exchange(like, rng, level) if same else any_exchange(rng, level), rng) for _ in range(count)
    ]


def long_conversation(rng: Random, level: float, tokens: int) -> Example:
    """Turns up to nearly `tokens`, so that the model works to the end of its context."""
    last = any_exchange(rng, level)
    room = tokens - max(len(encode(prompt_text(last.question, system))) for system in SYSTEMS) - 1
    room -= len(serialize(last, "").ids)
    earlier: list[tuple[str, str]] = []
    while True:
        turn = earlier_turn(any_exchange(rng, level), rng)
        room -= len(encode("".join(turn))) + 3
        if room < 0:
            break
        earlier.append(turn)
    return serialize(last, prompt_text(last.question, some_system(rng), earlier))


def some_system(rng: Random) -> str:
    return rng.choice(SYSTEMS) if rng.random() < 0.08 else ""


def finish(exchange: Exchange, prompt: str, rng: Random) -> Example:
    """The last exchange: mostly whole, at times with its thinking cut short or empty."""
    roll = rng.random()
    if roll < 0.04:
        return serialize_cut(exchange, prompt, rng)
    if roll < 0.08:
        return serialize_cut(exchange, prompt)
    return serialize(exchange, prompt)


def example(name: str, rng: Random, progress: float) -> Example:
    """A random example of one entry of SHARES."""
    level = level_at(progress)
    if name == "practice":
        exchange = practice(rng)
        return serialize(exchange, prompt_text(exchange.question))
    if name == "chat":
        if rng.random() < 0.3:
            turn, exchange = follow_up(rng, level)
            return finish(exchange, prompt_text(exchange.question, some_system(rng), [turn]), rng)
        exchange = chat(rng) if rng.random() < 0.85 else beyond(rng)
    else:
        exchange = task_exchange(name, rng, level)
    talked = rng.random() < TALKED * progress
    earlier = some_earlier(rng, level, name if name in TASKS else "") if talked else []
    return finish(exchange, prompt_text(exchange.question, some_system(rng), earlier), rng)

"""The decode loop: sample a token, tell it, run it, until the model or a limit ends the answer."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from hybrid_rt.detokenize import Detokenizer
from hybrid_rt.sampling import Sampler, Sampling
from hybrid_rt.thinking import WAIT, Part, ThinkingSplitter, end_of_thinking_ids, starts_inside
from hybrid_rt.tokenizer import Tokenizer
from quant.errors import Dsr1Error
from quant.progress import Steps, untold

if TYPE_CHECKING:
    from hybrid_rt.session import Session

TAG_TOKENS = 16  # enough of a prompt's end to hold the opening tag, however it is tokenised
FinishReason = Literal["stop", "length", "cancelled"]


class CancelledError(Exception):
    """`Session.cancel` was called between two chunks of a prompt."""


@dataclass(frozen=True)
class Timings:
    """Counts and seconds so far. `prefilled` are the prompt's tokens that were computed, not found in the cache."""

    prompt_tokens: int
    prefilled: int
    prefill_s: float
    tokens: int = 0
    decode_s: float = 0.0

    @property
    def prefill_tok_s(self) -> float:
        return self.prefilled / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        return self.tokens / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class Step:
    """One token of an answer. `text` is what it adds, without the tags around the thinking; it may be empty."""

    token_id: int
    text: str
    is_thinking: bool
    finish_reason: FinishReason | None
    timings: Timings


@dataclass(frozen=True)
class Completion:
    """A whole answer: `text` without the thinking, and `reasoning`, the thinking."""

    text: str
    reasoning: str
    token_ids: list[int]
    finish_reason: FinishReason
    timings: Timings


class AnswerText:
    """Turns token ids into text, told apart into thinking and answer, and counts the thinking."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        inside = starts_inside(tokenizer.decode(prompt[-TAG_TOKENS:]))
        self.detokenizer = Detokenizer(tokenizer)
        self.splitter = ThinkingSplitter(inside, tokenizer.think_open_id, tokenizer.think_close_id)
        self.thinking_tokens = 0

    def feed(self, token_id: int) -> Part:
        """The text that `token_id` adds, and whether it is thinking."""
        self.thinking_tokens += self.splitter.is_thinking
        return self.splitter.feed(token_id, self.detokenizer.feed(token_id))

    def last(self, token_id: int, reason: FinishReason) -> Part:
        """What the last token adds, with what was held back for a character or a tag that did not come."""
        part = Part("", self.splitter.is_thinking) if reason == "stop" else self.feed(token_id)
        rest = self.splitter.flush(self.detokenizer.flush())
        return Part(part.text + rest.text, rest.is_thinking if rest.text else part.is_thinking)


class TokenSource:
    """The next token: sampled, unless the thinking is over its budget and has to be closed, or would end too early.

    An early end is replaced by WAIT, upon which the model thinks on ("budget forcing": s1, arXiv 2501.19393,
    section 3).
    """

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling) -> None:
        self.sampler = Sampler(sampling, tokenizer.vocab_size)
        self.budget, self.at_least = sampling.think_budget, sampling.think_at_least or 0
        self.closing = end_of_thinking_ids(tokenizer)
        self.ends = {tokenizer.think_close_id, *tokenizer.eos_ids}
        self.waiting = tokenizer.encode(WAIT) if self.at_least else []
        self.forced: deque[int] = deque()
        if self.at_least and tokenizer.think_close_id is None:
            raise Dsr1Error("this model ends its thinking with no token of its own; leave out --think-at-least")

    def next(self, logits: torch.Tensor, answer: AnswerText) -> int:
        if answer.splitter.is_thinking and not self.forced:
            if self.budget is not None and answer.thinking_tokens >= self.budget:
                self.budget = None
                self.forced.extend(self.closing)
            elif answer.thinking_tokens < self.at_least:
                return self._think_on(self.sampler.pick(logits))
        return self.forced.popleft() if self.forced else self.sampler.pick(logits)

    def _think_on(self, chosen: int) -> int:
        if chosen not in self.ends:
            return chosen
        self.forced.extend(self.waiting)
        return self.forced.popleft()


def generate(session: "Session", ids: Sequence[int], sampling: Sampling, report: Steps = untold) -> Iterator[Step]:
    """The steps of `Session.generate`."""
    tokenizer = session.engine.tokenizer
    answer, source = AnswerText(tokenizer, ids), TokenSource(tokenizer, sampling)
    session.cancelled = False
    started = time.perf_counter()
    try:
        known, logits = session.prefill(ids, report)
    except CancelledError:
        return
    decode_started = time.perf_counter()
    timings = Timings(len(ids), len(ids) - known, decode_started - started)
    limit = min(sampling.max_new_tokens or session.room + 1, session.room + 1)
    for count in range(1, limit + 1):
        token_id = source.next(logits, answer)
        reason = _finish_reason(session, token_id, count == limit)
        timings = replace(timings, tokens=count, decode_s=time.perf_counter() - decode_started)
        part = answer.last(token_id, reason) if reason else answer.feed(token_id)
        yield Step(token_id, part.text, part.is_thinking, reason, timings)
        if reason:
            return
        logits = session.append([token_id])


def _finish_reason(session: "Session", token_id: int, is_last: bool) -> FinishReason | None:
    if token_id in session.engine.tokenizer.eos_ids:
        return "stop"
    if session.cancelled:
        return "cancelled"
    return "length" if is_last else None


def collect(steps: Iterable[Step]) -> Completion:
    """Read an answer to its end. It must have a step: see `Session.generate` for when it has none."""
    taken = list(steps)
    return Completion(
        text="".join(step.text for step in taken if not step.is_thinking).lstrip("\n"),
        reasoning="".join(step.text for step in taken if step.is_thinking).strip("\n"),
        token_ids=[step.token_id for step in taken],
        finish_reason=taken[-1].finish_reason or "stop",
        timings=taken[-1].timings,
    )

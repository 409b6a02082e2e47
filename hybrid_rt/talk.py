"""A conversation that goes on at once: what was said on disk, what was computed in a cache, and the next turn prepared.

A chat template may drop the thinking of earlier answers (R1's does). Then the last answer stands at other positions
than those where it was generated, behind other tokens, and has to be run again: that happens in `prepare`, while the
user types. Everything before it is reused.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_rt.conversation import Conversation, Turn, answered, ask, begin, forget, part
from hybrid_rt.engine import Engine
from hybrid_rt.event_log import EventLog
from hybrid_rt.generation import CancelledError, Step
from hybrid_rt.latent_store import LatentStore
from hybrid_rt.sampling import Sampling
from hybrid_rt.saved_conversations import Saved, SavedConversations
from quant.errors import ContextError, Dsr1Error
from quant.progress import Steps, untold

PART_S = 5.0  # of an answer that a kill may lose
LOST = "lost"  # finish of an answer that a kill cut short


@dataclass(frozen=True)
class Resumed:
    """What continuing a conversation found.

    tokens: of its history. cached: those of them that need not be run again. damaged: lines that could not be read.
    """

    tokens: int
    cached: int
    damaged: int
    had_lost_answer: bool
    has_open_question: bool


class Talk:
    """One conversation at a time on an engine. store: None keeps no cached tokens on disk.

    Everything but `prepare` runs on one thread; each method waits for a preparation first, or stops it.
    """

    def __init__(
        self, engine: Engine, model: str, saved: SavedConversations | None = None, store: LatentStore | None = None
    ) -> None:
        self.engine, self.model, self.store = engine, model, store
        self.saved = saved or SavedConversations()
        self.session = engine.session()
        self.conversation = Conversation(model)
        self.log: EventLog | None = None
        self.error: Dsr1Error | None = None  # of a preparation
        self._preparation: threading.Thread | None = None
        self._preparing = 0  # tokens that the preparation leads to

    def begin(self, system: str = "") -> None:
        """A new conversation; its file is made with the first question."""
        self.leave()
        self.conversation = Conversation(self.model, time.strftime("%Y-%m-%dT%H:%M:%S%z"), system=system)

    def resume(self, saved: Saved) -> Resumed:
        """Continue a conversation, with what the disk still has of its cache. Raises InUseError, Dsr1Error."""
        log = self.saved.open(saved)
        self.leave()
        self.log, self.conversation = log, Conversation.replay(log.events)
        last = self.conversation.turns[-1] if self.conversation.turns else None
        lost = last is not None and last.is_open and bool(last.reasoning or last.answer)
        if lost and last is not None:
            self.record(answered(Turn(last.user, last.reasoning, last.answer, LOST)))
        ids = self.history_ids()
        cached = self.store.restore(self.session, ids[: self.engine.context]) if self.store and ids else 0
        return Resumed(len(ids), cached, log.damaged, lost, last is not None and last.is_open and not lost)

    def record(self, event: Mapping[str, Any]) -> None:
        """Apply an event, after it is on the disk."""
        if self.log is None and event["kind"] in ("ask", "name"):
            self.log = EventLog.open(self.saved.new_path())
            self.log.append(begin(self.conversation.model, self.conversation.created))
            if self.conversation.system:
                self.log.append({"kind": "system", "text": self.conversation.system})
        if self.log is not None:
            self.log.append(event)
        self.conversation.apply(event)

    @property
    def open_question(self) -> str | None:
        """The last question, if nothing was answered to it."""
        turns = self.conversation.turns
        return turns[-1].user if turns and turns[-1].is_open else None

    def ask(self, question: str) -> None:
        """Put a question, in place of one that was left open."""
        self.withdraw()
        self.record(ask(question))

    def withdraw(self) -> None:
        """Forget a question that nothing was answered to."""
        if self.open_question is not None:
            self.record(forget(last=1))

    def prompt_ids(self, think: bool | None = None) -> list[int]:
        """The conversation with its open question as the tokens to generate from."""
        return self.engine.prompt_ids(self.conversation.messages(), think)

    def history_ids(self) -> list[int]:
        """The tokens of all that was answered; none before the first turn."""
        closed = Conversation(system=self.conversation.system, summary=self.conversation.summary)
        closed.turns = [turn for turn in self.conversation.turns if not turn.is_open]
        messages = closed.messages()
        return self.engine.history_ids(messages) if messages else []

    def answer(self, sampling: Sampling, think: bool | None = None, report: Steps = untold) -> Iterator[Step]:
        """Answer the open question. Parts of the answer, and then all of it, are on the disk before they end.

        Raises ContextError before the first step if the conversation is longer than the context.
        """
        ids = self.prompt_ids(think)
        if self.is_preparing:
            self.wait()
            if self.session.cancelled:
                return
        if self.store and len(ids) <= self.engine.context:
            self.store.restore(self.session, ids)
        said, written = _Said(), time.monotonic()
        try:
            for step in self.session.generate(ids, sampling, report):
                said.add(step)
                if step.finish_reason is not None:
                    self._close(said, step.finish_reason)
                elif time.monotonic() - written > PART_S:
                    written = time.monotonic()
                    self.record(said.new_part())
                yield step
        except GeneratorExit:
            self._close(said, "cancelled")
            raise

    def _close(self, said: "_Said", finish: str) -> None:
        if self.open_question is not None:
            self.record(answered(said.turn(self.open_question, finish)))

    def prepare(self) -> None:
        """In the background: run what the next question will stand behind, and write it to the disk."""
        self.wait()
        ids = self.history_ids()
        if ids and len(ids) < self.engine.context:
            self.session.cancelled, self._preparing = False, len(ids)
            self._preparation = threading.Thread(target=self._prepare, args=(ids,), daemon=True)
            self._preparation.start()

    def _prepare(self, ids: list[int]) -> None:
        try:
            if self.store:
                self.store.restore(self.session, ids)
            known = self.session.keep_common(ids)
            self.session.extend(ids[known:])
        except CancelledError:
            pass
        except (ContextError, Dsr1Error) as error:
            self.error = error
        if self.store:
            self.store.keep(self.session)

    @property
    def is_preparing(self) -> bool:
        return self._preparation is not None and self._preparation.is_alive()

    @property
    def preparation(self) -> tuple[int, int]:
        """Tokens of the history that are computed, of how many."""
        return len(self.session.tokens), self._preparing

    def wait(self, timeout: float | None = None) -> bool:
        """Until the preparation is done, at most `timeout` seconds. Returns whether it is."""
        if self._preparation is not None:
            self._preparation.join(timeout)
        return not self.is_preparing

    def leave(self) -> None:
        """Let go of the conversation: a preparation is stopped, what it has done is kept, and the file is closed."""
        if self.is_preparing:
            self.session.cancel()
        self.wait()
        if self.log is not None:
            self.log.close()
            self.log = None


class _Said:
    """The text of an answer that comes, and how much of it is on disk already."""

    def __init__(self) -> None:
        self.reasoning, self.answer = "", ""
        self._written = (0, 0)

    def add(self, step: Step) -> None:
        if step.is_thinking:
            self.reasoning += step.text
        else:
            self.answer += step.text

    def new_part(self) -> dict[str, Any]:
        """The event of what came since the last call."""
        first, second = self._written
        self._written = len(self.reasoning), len(self.answer)
        return part(self.reasoning[first:], self.answer[second:])

    def turn(self, question: str, finish: str) -> Turn:
        return Turn(question, self.reasoning.strip("\n"), self.answer.lstrip("\n"), finish)

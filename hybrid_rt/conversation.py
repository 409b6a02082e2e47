"""What was said in a conversation: turns of a question, the thinking and the answer. Events build it up."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

VERSION = 1
Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """A question and what came of it. finish: as in `Step.finish_reason`; "lost" if the process died meanwhile."""

    user: str
    reasoning: str = ""
    answer: str = ""
    finish: str = ""

    @property
    def is_open(self) -> bool:
        """Whether nothing has ended it yet."""
        return not self.finish


@dataclass
class Conversation:
    """The state that a list of events leads to.

    model: the name of the model that it was begun with. summary: stands for earlier turns that were put together.
    """

    model: str = ""
    created: str = ""
    name: str = ""
    system: str = ""
    summary: str = ""
    turns: list[Turn] = field(default_factory=list)

    @classmethod
    def replay(cls, events: Iterable[Mapping[str, Any]]) -> "Conversation":
        """The conversation that `events` tell. Unknown kinds of a later version are passed over."""
        conversation = cls()
        for event in events:
            conversation.apply(event)
        return conversation

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take over one event: `kind` and its fields, as the functions below make them."""
        text = {name: value for name, value in event.items() if isinstance(value, str)}
        match event.get("kind"):
            case "begin":
                self.model, self.created = text.get("model", ""), text.get("created", "")
            case "system":
                self.system = text.get("text", "")
            case "name":
                self.name = text.get("text", "")
            case "summary":
                self.summary, self.turns = text.get("text", ""), []
            case "ask":
                self.turns.append(Turn(text.get("text", "")))
            case "part" if self.turns:
                turn = self.turns[-1]
                reasoning, answer = turn.reasoning + text.get("reasoning", ""), turn.answer + text.get("text", "")
                self.turns[-1] = replace(turn, reasoning=reasoning, answer=answer)
            case "answer" if self.turns:
                self.turns[-1] = Turn(
                    self.turns[-1].user, text.get("reasoning", ""), text.get("text", ""), text.get("finish") or "stop"
                )
            case "forget":
                first, last = _count(event.get("first")), _count(event.get("last"))
                self.turns = self.turns[first : max(first, len(self.turns) - last)]

    @property
    def title(self) -> str:
        """The first question, in few words, or the name that the user gave."""
        first = self.turns[0].user.split("\n")[0] if self.turns else ""
        return self.name or (first if len(first) <= 60 else f"{first[:59]}…")

    def messages(self) -> list[Message]:
        """What the chat template gets. An open last turn is a question with no answer yet."""
        said: list[Message] = []
        system = "\n\n".join(part for part in (self.system, _told(self.summary)) if part)
        if system:
            said.append({"role": "system", "content": system})
        for turn in self.turns:
            said.append({"role": "user", "content": turn.user})
            if not turn.is_open:
                said.append({"role": "assistant", "content": turn.answer})
        return said


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _told(summary: str) -> str:
    return f"What was said before, in short:\n{summary}" if summary else ""


def begin(model: str, created: str) -> dict[str, Any]:
    """The first event of a conversation. created: a date and time, ISO 8601."""
    return {"kind": "begin", "version": VERSION, "model": model, "created": created}


def ask(text: str) -> dict[str, Any]:
    return {"kind": "ask", "text": text}


def part(reasoning: str, answer: str) -> dict[str, Any]:
    """What was added to the answer since the last such event, while it still comes."""
    return {"kind": "part", "reasoning": reasoning, "text": answer}


def answered(turn: Turn) -> dict[str, Any]:
    return {"kind": "answer", "reasoning": turn.reasoning, "text": turn.answer, "finish": turn.finish}


def forget(first: int = 0, last: int = 0) -> dict[str, Any]:
    """Drop the oldest `first` turns and the latest `last`."""
    return {"kind": "forget", "first": first, "last": last}


def text_event(kind: str, text: str) -> dict[str, Any]:
    """A "system" prompt, a "name" or a "summary"."""
    return {"kind": kind, "text": text}


def to_markdown(conversation: Conversation, with_reasoning: bool = True) -> str:
    """For people to read elsewhere."""
    parts = [f"# {conversation.title or 'Conversation'}", f"Model: {conversation.model}. {conversation.created}"]
    parts += [f"**System**\n\n{text}" for text in (conversation.system, _told(conversation.summary)) if text]
    for turn in conversation.turns:
        parts.append(f"**You**\n\n{turn.user}")
        if turn.reasoning and with_reasoning:
            quoted = "\n".join(f"> {line}".rstrip() for line in turn.reasoning.split("\n"))
            parts.append(f"**Thinking**\n\n{quoted}")
        parts.append(f"**Answer**\n\n{turn.answer}")
    return "\n\n".join(parts) + "\n"


def to_json(conversation: Conversation) -> dict[str, Any]:
    """For programs: messages with `role` and `content`, and `reasoning` beside the answers that have one."""
    messages: list[dict[str, str]] = []
    for message in conversation.messages():
        messages.append(dict(message))
    reasonings: Sequence[str] = [turn.reasoning for turn in conversation.turns if not turn.is_open]
    answers = (message for message in messages if message["role"] == "assistant")
    for message, reasoning in zip(answers, reasonings, strict=True):
        if reasoning:
            message["reasoning"] = reasoning
    return {"model": conversation.model, "created": conversation.created, "messages": messages}

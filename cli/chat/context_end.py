"""The end of a context: a warning, then a choice. Nothing is cut in silence."""

from typing import TYPE_CHECKING

from hybrid_rt.conversation import forget, text_event
from hybrid_rt.generation import collect
from quant.errors import Dsr1Error, UsageError

if TYPE_CHECKING:
    from cli.chat.loop import Chat

WARN_SHARE = 0.8  # of the context
ANSWER_SHARE = 16  # an answer gets at least this fraction of the context, and at most MIN_ANSWER tokens of it
MIN_ANSWER = 512
SUMMARY_TOKENS = 400
SUMMARISE = (
    "Summarise our conversation so far for yourself, so that we can go on from the summary alone: what I wanted, what "
    "was found, and what is still open. Be brief."
)


def least_room(context: int) -> int:
    """Tokens that an answer should have."""
    return min(MIN_ANSWER, max(1, context // ANSWER_SHARE))


def warn(chat: "Chat") -> None:
    """Say once a turn that the context fills up."""
    used, context = chat.history_tokens(), chat.engine.context
    if used > WARN_SHARE * context:
        chat.screen.line(
            f"{used:,} of {context:,} tokens of context are used; /new, /summary and /drop make room", "warning"
        )


def make_room(chat: "Chat") -> bool:
    """Whether the open question may be answered; asks the user what to give up where it does not fit."""
    while True:
        needed, context = len(chat.talk.prompt_ids(chat.settings.think)), chat.engine.context
        if needed + least_room(context) <= context:
            return True
        question = chat.talk.open_question or ""
        if len(chat.talk.conversation.turns) == 1:
            return _alone(chat, needed, context)
        chat.screen.line(
            f"the conversation and this question have {needed:,} tokens, and the context holds {context:,}", "warning"
        )
        choice = chat.reader.choose("[n]ew conversation, [s]ummary, [d]rop oldest turns, or [c]ancel?", "nsdc")
        if choice == "c":
            return False
        _give_up(chat, choice, question)


def _alone(chat: "Chat", needed: int, context: int) -> bool:
    """A question that does not fit even by itself, or only just."""
    if needed >= context:
        raise Dsr1Error(
            f"this question alone has {needed:,} tokens and the context holds {context:,}; "
            "shorten it, or start with a larger --context"
        )
    chat.screen.line(f"only {context - needed:,} tokens are left for the answer", "warning")
    return True


def _give_up(chat: "Chat", choice: str, question: str) -> None:
    if choice == "n":
        chat.talk.begin(chat.talk.conversation.system)
    elif choice == "s":
        chat.talk.withdraw()
        summarise(chat)
    else:
        _drop_until_it_fits(chat)
    if chat.talk.open_question is None:
        chat.talk.ask(question)


def _drop_until_it_fits(chat: "Chat") -> None:
    dropped = 0
    context = chat.engine.context
    while len(chat.talk.conversation.turns) > 1:
        if len(chat.talk.prompt_ids(chat.settings.think)) + least_room(context) <= context:
            break
        chat.talk.record(forget(first=1))
        dropped += 1
    chat.screen.line(f"dropped the oldest {dropped} turns", "dim")


def drop_oldest(chat: "Chat", count: int) -> None:
    """Forget `count` turns."""
    there = len(chat.talk.conversation.turns)
    if count < 1 or count > there:
        raise UsageError(f"there are {there} turns; give a number from 1 to {there}")
    chat.talk.record(forget(first=count))
    chat.screen.line(f"dropped the oldest {count} of {there} turns", "dim")


def summarise(chat: "Chat") -> None:
    """Put the model's own summary in the place of all turns; the oldest are dropped first if they do not fit."""
    talk, context = chat.talk, chat.engine.context
    room = min(SUMMARY_TOKENS, context // 4)
    messages = talk.conversation.messages()
    asked = {"role": "user", "content": SUMMARISE}
    head = [message for message in messages if message["role"] == "system"]
    said = messages[len(head) :]
    while len(ids := talk.engine.prompt_ids([*head, *said, asked], think=False)) + room > context and said:
        said = said[2:]
    if not said:
        raise Dsr1Error("not even the last turn fits beside a summary; use /new")
    talk.wait()
    chat.screen.line("summing up ...", "dim")
    with chat.interruptible():
        text = collect_summary(chat, ids, room)
    if not text:
        raise Dsr1Error("the model gave no summary; use /new or /drop")
    talk.record(text_event("summary", text))
    chat.screen.line(text, "quote")


def collect_summary(chat: "Chat", ids: list[int], room: int) -> str:
    """The model's summary, empty if it was stopped or wrote none."""
    from dataclasses import replace

    sampling = replace(chat.settings.sampling, max_new_tokens=room, think_budget=None, think_at_least=None)
    steps = list(chat.talk.session.generate(ids, sampling))
    if not steps or steps[-1].finish_reason == "cancelled":
        return ""
    return collect(steps).text.strip()

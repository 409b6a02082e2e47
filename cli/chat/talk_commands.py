"""Commands about what was said."""

from typing import TYPE_CHECKING

from cli.chat.commands import command
from cli.chat.context_end import drop_oldest, summarise
from hybrid_rt.conversation import forget, text_event
from quant.errors import UsageError

if TYPE_CHECKING:
    from cli.chat.loop import Chat


@command("/new", "", "begin a new conversation")
def new(chat: "Chat", _argument: str) -> None:
    chat.talk.begin(chat.talk.conversation.system)
    chat.attachments.clear()
    chat.screen.line("a new conversation", "dim")


@command("/undo", "", "take back the last question and its answer")
def undo(chat: "Chat", _argument: str) -> None:
    question = _last_question(chat)
    chat.talk.record(forget(last=1))
    chat.talk.prepare()
    chat.screen.line(f"took back: {_short(question)}", "dim")


@command("/retry", "", "answer the last question again")
def retry(chat: "Chat", _argument: str) -> None:
    question = _last_question(chat)
    sampling = chat.settings.sampling
    if chat.talk.open_question is None:
        if sampling.temperature == 0 or sampling.seed is not None:
            why = "temperature is 0" if sampling.temperature == 0 else f"seed is {sampling.seed}"
            chat.screen.line(f"{why}, so the answer will be the same; change it with /temp or /seed random", "dim")
        chat.talk.record(forget(last=1))
    chat.ask(question)


@command("/edit", "", "change the last question and ask it again")
def edit(chat: "Chat", _argument: str) -> None:
    chat.editing = _last_question(chat)


@command("/system", "[TEXT]", "show or change the system prompt; `none` removes it")
def system(chat: "Chat", argument: str) -> None:
    if argument:
        chat.talk.record(text_event("system", "" if argument == "none" else argument))
        chat.talk.prepare()
    chat.screen.line(f"system prompt: {chat.talk.conversation.system or 'none'}", "dim")


@command("/drop", "[N]", "forget the oldest N turns, by default 1")
def drop(chat: "Chat", argument: str) -> None:
    if argument and not argument.isdigit():
        raise UsageError(f"/drop takes a number of turns, not {argument}")
    drop_oldest(chat, int(argument or 1))
    chat.talk.prepare()


@command("/summary", "", "go on with a summary in place of the conversation")
def summary(chat: "Chat", _argument: str) -> None:
    _last_question(chat)
    chat.talk.withdraw()
    summarise(chat)
    chat.talk.prepare()


def _last_question(chat: "Chat") -> str:
    if not chat.talk.conversation.turns:
        raise UsageError("nothing was asked yet; type a question first")
    return chat.talk.conversation.turns[-1].user


def _short(text: str) -> str:
    line = text.strip().split("\n")[0]
    return line if len(line) <= 60 else f"{line[:59]}…"

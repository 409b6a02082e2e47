"""Commands that show the model, the machine and the tokens."""

from typing import TYPE_CHECKING

from rich.console import Console

from cli.chat.commands import command
from cli.terminal.answer import stats
from quant.errors import UsageError

if TYPE_CHECKING:
    from cli.chat.loop import Chat

SHOWN_TOKENS = 64


@command("/show", "plan|stats|template|tokens", "where the weights are, the last figures, the prompt's form and tokens")
def show(chat: "Chat", argument: str) -> None:
    views = {"plan": _plan, "stats": _stats, "template": _template, "tokens": _tokens}
    if argument not in views:
        raise UsageError(f"/show takes {', '.join(views)}{f', not {argument}' if argument else ''}")
    views[argument](chat)


def _plan(chat: "Chat") -> None:
    from cli.plan import show as show_plan

    show_plan(chat.engine.plan, chat.engine.folder.name, Console(highlight=False, markup=False))


def _stats(chat: "Chat") -> None:
    last = chat.last_step
    if last is None:
        chat.screen.line("there was no answer yet", "dim")
    else:
        chat.screen.line(stats(last.timings, last.finish_reason or "", chat.engine.context))
    chat.screen.line(f"{len(chat.talk.conversation.turns)} turns, {chat.history_tokens():,} tokens of history")


def _template(chat: "Chat") -> None:
    chat.screen.line(chat.engine.tokenizer.chat_template.source)


def _tokens(chat: "Chat") -> None:
    """The history's last tokens, each with its number."""
    ids = chat.talk.history_ids()
    tokenizer = chat.engine.tokenizer
    shown = " ".join(f"{token}:{tokenizer.decode([token])!r}" for token in ids[-SHOWN_TOKENS:])
    chat.screen.line(f"{len(ids):,} tokens{f', the last {SHOWN_TOKENS}:' if len(ids) > SHOWN_TOKENS else ''}")
    chat.screen.line(shown)


@command("/bench", "", "measure this model on this machine")
def bench(chat: "Chat", _argument: str) -> None:
    from cli.bench import measure_engine, show_engine

    chat.talk.wait()
    show_engine(measure_engine(chat.model, chat.engine))

"""Commands about how answers are made and shown."""

from typing import TYPE_CHECKING

from cli.chat.commands import COMMANDS, command
from quant.errors import UsageError

if TYPE_CHECKING:
    from cli.chat.loop import Chat

THINK = {"on": True, "off": False, "auto": None}


@command("/think", "on|off|auto|show|full|fold", "whether to think; show the last thinking; show all, or fold it")
def think(chat: "Chat", argument: str) -> None:
    if argument == "show":
        turns = [turn for turn in chat.talk.conversation.turns if turn.reasoning]
        chat.screen.line(turns[-1].reasoning if turns else "there was no thinking yet", "dim")
        return
    if argument in THINK:
        chat.settings.think = THINK[argument]
    elif argument in ("full", "fold"):
        chat.settings.full_thinking = argument == "full"
    elif argument:
        raise UsageError(f"/think takes {', '.join([*THINK, 'show', 'full', 'fold'])}, not {argument}")
    for line in chat.settings.lines()[-2:]:
        chat.screen.line(line, "dim")


def _setter(command_name: str, setting: str, takes: str, what: str) -> None:
    @command(command_name, takes, what)
    def run(chat: "Chat", argument: str) -> None:
        if argument:
            chat.settings.set(setting, argument)
        value = getattr(chat.settings.sampling, setting)
        chat.screen.line(f"{setting} = {'none' if value is None else value}", "dim")


_setter("/budget", "think_budget", "[N|none]", "close the thinking after N tokens")
_setter("/temp", "temperature", "[T]", "0 takes the likeliest token")
_setter("/seed", "seed", "[N|random]", "the same seed gives the same answer")


@command("/set", "[NAME VALUE]", "show the settings, or change one")
def set_(chat: "Chat", argument: str) -> None:
    if argument:
        name, _, value = argument.partition(" ")
        if not value.strip():
            raise UsageError(f"/set takes a name and a value, such as /set {name} 1")
        chat.settings.set(name, value.strip())
    for line in chat.settings.lines():
        chat.screen.line(line, "dim")


@command("/help", "", "this list")
def help_(chat: "Chat", _argument: str) -> None:
    heads = {c.name: f"{c.name} {c.takes}".strip() for c in COMMANDS.values()}
    width = max(len(head) for head in heads.values() if len(head) < 24)
    for entry in COMMANDS.values():
        chat.screen.line(f"{heads[entry.name]:{width}}  {entry.what}")
    chat.screen.line(
        'Alt+Enter or """ begins a further line, Tab completes, Ctrl+C stops an answer, Ctrl+D leaves.', "dim"
    )


@command("/exit", "", "leave; so does Ctrl+D")
def leave(chat: "Chat", _argument: str) -> None:
    raise EOFError

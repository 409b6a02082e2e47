"""The commands of the chat: their names, what they take, what they do; an unknown one suggests the nearest."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant.errors import UsageError

if TYPE_CHECKING:
    from cli.chat.loop import Chat

Handler = Callable[["Chat", str], None]


@dataclass(frozen=True)
class Command:
    """name: with its slash. takes: its argument, as help shows it. what: a few words."""

    name: str
    takes: str
    what: str
    run: Handler
    takes_path: bool = False


COMMANDS: dict[str, Command] = {}
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help", "/clear": "/new", "/q": "/exit"}


def command(name: str, takes: str, what: str, takes_path: bool = False) -> Callable[[Handler], Handler]:
    """Register a function as the command `name`."""

    def register(handler: Handler) -> Handler:
        COMMANDS[name] = Command(name, takes, what, handler, takes_path)
        return handler

    return register


def find(name: str) -> Command:
    """The command that `name` or its unique beginning names. Raises UsageError with the nearest one."""
    known = {**COMMANDS, **{alias: COMMANDS[target] for alias, target in ALIASES.items()}}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [c for c in known if c.startswith(name)]
    hint = f"did you mean {near[0]}?" if near else "/help lists those that there are"
    raise UsageError(f"there is no command {name}; {hint}")

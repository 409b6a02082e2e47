"""Reading what the user types: several lines, history, completion, and long pastes kept whole."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.styles import Style

from cli.chat.history import SharedHistory
from cli.escape import escape

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'
LONG_PASTE = 2000  # characters; beyond, the line shows a stand-in
STYLE = Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"})
PLAIN = Style.from_dict({"bottom-toolbar": "noreverse"})


class Reader:
    """A line editor. commands: names and what they do. paths: names of commands that take a file.

    status: the line below the input. is_fancy: whether colours are wanted.
    """

    def __init__(
        self,
        commands: Mapping[str, str],
        paths: Iterable[str],
        status: Callable[[], str],
        is_fancy: bool,
        history: Path | None = None,
    ) -> None:
        self.pastes: dict[str, str] = {}  # stand-in -> what it stands for
        self.session: PromptSession[str] = PromptSession(
            history=SharedHistory(history),
            multiline=True,
            key_bindings=self._keys(),
            completer=CommandCompleter(commands, frozenset(paths)),
            complete_while_typing=False,
            prompt_continuation=lambda _width, _line, _wrapped: MORE,
            bottom_toolbar=lambda: escape(status()),
            style=STYLE if is_fancy else PLAIN,
            enable_open_in_editor=True,
            refresh_interval=1.0,  # of the status line
        )
        self.asking: PromptSession[str] = PromptSession()

    def read(self, default: str = "") -> str:
        """What the user enters. Raises EOFError for Ctrl+D, KeyboardInterrupt for Ctrl+C on an empty line."""
        text = self.session.prompt(PROMPT, default=default)
        for stand_in, paste in self.pastes.items():
            text = text.replace(stand_in, paste)
        self.pastes.clear()
        return unquoted(text)

    def choose(self, question: str, keys: str) -> str:
        """One of the letters `keys`; the last one for anything else, Ctrl+C and Ctrl+D."""
        try:
            answer = self.asking.prompt(f"{escape(question)} ").strip().lower()[:1]
        except (EOFError, KeyboardInterrupt):
            return keys[-1]
        return answer if answer and answer in keys else keys[-1]

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @Condition
        def in_quotes() -> bool:
            return is_open(self.session.default_buffer.text)

        @keys.add(Keys.Enter, filter=~in_quotes)
        def _accept(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add(Keys.Escape, Keys.Enter)
        def _newline(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add(Keys.ControlC)
        def _clear(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt())

        @keys.add(Keys.BracketedPaste)
        def _paste(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text(self.shortened(event.data))

        return keys

    def shortened(self, pasted: str) -> str:
        """What stands in the line for a paste; `read` puts it back."""
        text = pasted.replace("\r\n", "\n").replace("\r", "\n")
        if len(text) <= LONG_PASTE:
            return text
        stand_in = f"[paste {len(self.pastes) + 1}: {text.count(chr(10)) + 1:,} lines, {len(text):,} characters]"
        self.pastes[stand_in] = text
        return stand_in


def is_open(text: str) -> bool:
    """Whether a text begins with quotes that are not closed yet."""
    begun = text.lstrip()
    return begun.startswith(QUOTES) and not (len(begun) >= 2 * len(QUOTES) and begun.rstrip().endswith(QUOTES))


def unquoted(text: str) -> str:
    """The text between the quotes, if there are any."""
    stripped = text.strip()
    if stripped.startswith(QUOTES) and not is_open(stripped):
        return stripped[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


class CommandCompleter(Completer):
    """Names of commands, and of files behind those that take one."""

    def __init__(self, commands: Mapping[str, str], paths: frozenset[str]) -> None:
        self.commands, self.paths = commands, paths
        self.files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not text.startswith("/"):
            return
        if space and name in self.paths:
            yield from self.files.get_completions(Document(rest.lstrip("\"'")), complete_event)
        elif not space:
            for command, what in self.commands.items():
                if command.startswith(name):
                    yield Completion(command, start_position=-len(name), display_meta=what)

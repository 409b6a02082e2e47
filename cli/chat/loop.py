"""The conversation on a terminal: read a line, do what it says, show what comes of it."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cli.chat import context_end, file_commands, setting_commands, show_commands, talk_commands  # noqa: F401
from cli.chat.commands import COMMANDS, find
from cli.chat.reader import Reader
from cli.chat.settings import Settings
from cli.escape import escape, say
from cli.options import RunOptions
from cli.run import choose_sampling, latent_store, load_engine, started
from cli.terminal.answer import AnswerView, stats
from cli.terminal.screen import Screen
from hybrid_rt.generation import Step
from hybrid_rt.saved_conversations import Saved
from hybrid_rt.talk import Resumed, Talk
from quant.errors import Dsr1Error

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

LEAVING_S = 0.5  # after which leaving says what it waits for


class Chat:
    """A user at a terminal. attachments: texts of files that go before the next question."""

    def __init__(self, options: RunOptions, resume: bool = False, session: str | None = None) -> None:
        self.screen = Screen()
        self.model = options.model
        begun = time.monotonic()
        self.engine = load_engine(options)
        sampling = replace(choose_sampling(self.engine, options), seed=options.seed)
        self.settings = Settings(sampling, options.think)
        self.talk = Talk(self.engine, options.model, store=latent_store(self.engine, options))
        paths = [command.name for command in COMMANDS.values() if command.takes_path]
        whats = {command.name: command.what for command in COMMANDS.values()}
        self.reader = Reader(whats, paths, self.status, self.screen.is_fancy)
        self.attachments: list[str] = []
        self.editing: str | None = None
        self.last_step: Step | None = None
        self._history: tuple[int, int] = (0, 0)
        self.screen.line(f"loaded from {tilde(self.engine.folder)} in {time.monotonic() - begun:.1f} s", "dim")
        self.screen.line(started(self.engine, options.model), "dim")
        self.talk.begin(options.system or "")
        self._resume_as_asked(resume, session)

    def _resume_as_asked(self, resume: bool, session: str | None) -> None:
        if session is not None:
            self.resume(self.talk.saved.find(session))
        elif resume:
            saved = self.talk.saved.latest()
            if saved is None:
                self.screen.line("there is no conversation to resume; this is a new one", "dim")
            else:
                self.resume(saved)

    def loop(self) -> None:
        """Talk until the user leaves."""
        self.screen.line("/help lists the commands; Ctrl+C stops an answer, Ctrl+D leaves", "dim")
        try:
            while True:
                try:
                    self.take(self.read())
                except KeyboardInterrupt:
                    if self.reader.choose("leave? [y]es or [n]o:", "yn") == "y":
                        return
                except EOFError:
                    return
        finally:
            self.leave()

    def read(self) -> str:
        """What the user enters; an empty text for nothing."""
        default, editing = self.editing or "", self.editing is not None
        self.editing = None
        text = self.reader.read(default)
        if editing and text.strip() and self.talk.conversation.turns:
            talk_commands.undo(self, "")
        return text

    def take(self, text: str) -> None:
        """Do what a line says. What goes wrong is told, and the conversation goes on."""
        try:
            if text.startswith("/") and "\n" not in text.strip():
                name, _, argument = text.strip().partition(" ")
                find(name).run(self, argument.strip())
            elif text.strip():
                self.ask("".join(f"{content}\n" for content in self.attachments) + text)
                self.attachments.clear()
        except Dsr1Error as error:
            self.screen.status([])
            say(str(error))
        self._tell_notes()

    def ask(self, question: str) -> None:
        """Put a question and show the answer."""
        self.talk.ask(question)
        try:
            fits = context_end.make_room(self)
        except Dsr1Error:
            self.talk.withdraw()
            raise
        if not fits:
            self.talk.withdraw()
            return
        with self.interruptible():
            self._show_answer()
        self.talk.prepare()
        context_end.warn(self)

    def _show_answer(self) -> None:
        view = AnswerView(self.screen, self.settings.full_thinking)
        while not self.talk.wait(0.1) and not self.talk.session.cancelled:
            done, total = self.talk.preparation
            self.screen.status([f"reading the answer before: {done:,} of {total:,} tokens"])
        last = view.show(self.talk.answer(self.settings.sampling, self.settings.think, view.reading))
        if last is None:
            self.screen.line("stopped before the answer began; /retry asks again", "dim")
            return
        self.last_step = last
        self.screen.line(f"{stats(last.timings, last.finish_reason or 'stop', self.engine.context)}\n", "dim")

    def resume(self, saved: Saved) -> None:
        """Continue a conversation that is on disk."""
        found = self.talk.resume(saved)
        for line in describe_resumed(found, saved, self.model):
            self.screen.line(line, "dim")
        self.show_last_turn()
        self.talk.prepare()

    def show_last_turn(self) -> None:
        """What was said last, so that the user knows where the conversation stands."""
        turn = self.talk.conversation.turns[-1] if self.talk.conversation.turns else None
        if turn is None:
            return
        self.screen.line(f">>> {turn.user}")
        view = AnswerView(self.screen)
        self.screen.write([*view.markdown.feed(escape(turn.answer)), *view.markdown.finish()])

    def status(self) -> str:
        """The line below the input."""
        if self.talk.is_preparing:
            done, total = self.talk.preparation
            return f"{self.model} · preparing {done:,} of {total:,} tokens"
        attached = f" · {len(self.attachments)} files attached" if self.attachments else ""
        return f"{self.model} · context {self.history_tokens():,} of {self.engine.context:,}{attached}"

    def history_tokens(self) -> int:
        """Tokens of what was said so far."""
        state = hash((self.talk.conversation.system, self.talk.conversation.summary, *self.talk.conversation.turns))
        if self._history[0] != state:
            self._history = (state, len(self.talk.history_ids()))
        return self._history[1]

    def attached_tokens(self) -> int:
        return sum(len(self.engine.tokenizer.encode(text)) for text in self.attachments)

    def path(self) -> Path | None:
        """The file of this conversation, once it has one."""
        return self.talk.log.path if self.talk.log is not None else None

    def leave(self) -> None:
        """Keep what is computed."""
        if self.talk.is_preparing:
            self.talk.session.cancel()
            if not self.talk.wait(LEAVING_S):
                self.screen.line("keeping the cache of this conversation ...", "dim")
        self.talk.leave()

    def _tell_notes(self) -> None:
        """What a preparation or the cache had to say."""
        store = self.talk.store
        notes = [*(store.notes if store else []), *([str(self.talk.error)] if self.talk.error else [])]
        self.talk.error = None
        if store:
            store.notes.clear()
        for note in notes:
            say(note)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl+C stops the answer and keeps what came; pressed again before that has happened, it leaves.

        What is typed meanwhile is not shown, and is there for the next line.
        """

        def stop(_signal: int, _frame: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.talk.session.cancel()

        before = signal.signal(signal.SIGINT, stop)
        try:
            with no_echo():
                yield
        finally:
            signal.signal(signal.SIGINT, before)


@contextmanager
def no_echo() -> Iterator[None]:
    """Keep what the user types from the screen."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def tilde(path: Path) -> str:
    """A path, its beginning as `~` where it lies in the user's home."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def describe_resumed(found: Resumed, saved: Saved, model: str) -> list[str]:
    """What the user should know about a conversation that goes on."""
    when = time.strftime("%d %b %H:%M", time.localtime(saved.changed))
    lines = [
        f"resuming {saved.conversation.name or saved.id} of {when}: {found.tokens:,} tokens, "
        f"{found.cached:,} of them from the cache"
    ]
    if saved.conversation.model != model:
        lines.append(f"it was begun with {saved.conversation.model}, and goes on with {model}")
    if found.damaged:
        lines.append(f"{found.damaged} lines of its file are damaged and were left out")
    if found.had_lost_answer:
        lines.append("its last answer was cut short when the program ended; /retry asks again")
    if found.has_open_question:
        lines.append("its last question was not answered; /retry asks it again")
    return lines

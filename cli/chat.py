"""The conversation on a terminal."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prompt_toolkit import PromptSession

from cli.escape import say
from cli.options import RunOptions
from cli.output import AnswerPrinter
from cli.run import choose_sampling, load_engine
from hybrid_rt.generation import Step
from quant.errors import Dsr1Error

LEAVE = ("/exit", "/quit", "/bye")


class Chat:
    """Reads a line, answers it, and remembers both. The session keeps the cache between turns."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.engine = load_engine(options)
        self.sampling = choose_sampling(self.engine, options)
        self.session = self.engine.session()
        self.messages = [{"role": "system", "content": options.system}] if options.system else []

    def loop(self) -> None:
        """Talk until Ctrl+D or /exit."""
        say("Ctrl+C stops an answer, Ctrl+D or /exit leaves.")
        reader: PromptSession[str] = PromptSession()
        while True:
            try:
                line = reader.prompt(">>> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if line.strip() in LEAVE:
                return
            if line.strip():
                self.turn(line)

    def turn(self, line: str) -> None:
        """Answer one line. What goes wrong is told, and the conversation stays as it was."""
        asked = [*self.messages, {"role": "user", "content": line}]
        told: list[Step] = []
        try:
            ids = self.engine.prompt_ids(asked, think=self.options.think)
            with self.interruptible():
                AnswerPrinter().show(_remember(self.session.generate(ids, self.sampling), told))
        except Dsr1Error as error:
            say(str(error))
            return
        answer = "".join(step.text for step in told if not step.is_thinking).lstrip("\n")
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl+C stops the answer and keeps what came; pressed again before that has happened, it leaves."""

        def stop(_signal: int, _frame: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.session.cancel()

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _remember(steps: Iterable[Step], told: list[Step]) -> Iterator[Step]:
    for step in steps:
        told.append(step)
        yield step

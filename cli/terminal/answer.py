"""An answer on the terminal as it comes: a status while the prompt is read, the thinking in a window, then the text."""

import time
from collections.abc import Callable, Iterable

from cli.escape import escape
from cli.terminal.inline import Piece
from cli.terminal.markdown import MarkdownStream
from cli.terminal.screen import Screen
from cli.terminal.wrap import wrap
from hybrid_rt.generation import Step, Timings

WINDOW_ROWS = 6  # of thinking that are shown while it goes on
REDRAW_S = 0.1
SLOW_S = 0.3  # reading that takes longer gets a status


class AnswerView:
    """Shows one answer. full_thinking: whether the thinking stays on the screen instead of being folded."""

    def __init__(
        self, screen: Screen, full_thinking: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.screen, self.full_thinking, self.clock = screen, full_thinking, clock
        self.markdown = MarkdownStream(lambda: screen.width)
        self.started = self.drawn = clock()
        self.reasoning = ""
        self.thinking_tokens = 0
        self.thought_s: float | None = None  # once the thinking is over
        self.begun = False

    def reading(self, done: int, total: int) -> None:
        """Tell how far the reading of the prompt is."""
        elapsed = self.clock() - self.started
        text = f"reading the prompt: {done:,} of {total:,} tokens"
        if done:
            speed = done / max(elapsed, 1e-9)
            text += f" · {speed:,.0f} tokens/s · {(total - done) / speed:,.0f} s left"
        if total > done and (elapsed > SLOW_S or total > 512):
            self.screen.status([text])

    def show(self, steps: Iterable[Step]) -> Step | None:
        """Show `steps` as they come. Returns the last, None if there was none."""
        last = None
        for last in steps:
            if last.is_thinking:
                self._think(escape(last.text))
            elif last.text or self.begun:
                self._answer(escape(last.text))
        self.screen.status([])
        if last is not None and not self.begun:
            self._fold()
        self.screen.write(self.markdown.finish())
        return last

    def _think(self, text: str) -> None:
        if not self.thinking_tokens:
            self.started = self.clock()  # reading the prompt is over
        self.thinking_tokens += 1
        self.reasoning += text
        if self.full_thinking:
            self.screen.write([Piece(text, "dim")])
        elif self.clock() - self.drawn >= REDRAW_S:
            self.drawn = self.clock()
            self.screen.status([self._heading("thinking"), *self._window()])

    def _window(self) -> list[str]:
        rows = min(WINDOW_ROWS, max(0, self.screen.height - 4))
        recent = self.reasoning[-rows * self.screen.width :]
        return [f"│ {line}" for line in wrap(recent.strip("\n"), self.screen.width - 2)[-rows:]] if rows else []

    def _heading(self, what: str) -> str:
        return f"{what} {self.clock() - self.started:.0f} s, {self.thinking_tokens:,} tokens"

    def _fold(self) -> None:
        """The thinking becomes one line."""
        self.thought_s = self.clock() - self.started
        if not self.reasoning.strip():
            return
        if self.full_thinking:
            self.screen.write([Piece("\n")])
        self.screen.line(self._heading("thought for"), "dim")

    def _answer(self, text: str) -> None:
        if not self.begun:
            text = text.lstrip("\n")
            if not text:
                return
            self.begun = True
            self._fold()
        self.screen.write(self.markdown.feed(text))
        if self.markdown.waiting and self.clock() - self.drawn >= REDRAW_S:
            self.drawn = self.clock()
            self.screen.status([self.markdown.waiting])


def stats(timings: Timings, finish_reason: str, context: int) -> str:
    """One line about what an answer took and how full the context is."""
    ended = {"length": " · cut at the limit", "cancelled": " · stopped"}.get(finish_reason, "")
    used = timings.prompt_tokens + timings.tokens
    reused = timings.prompt_tokens - timings.prefilled
    return (
        f"{timings.tokens:,} tokens, {timings.decode_tok_s:,.1f}/s · prompt {timings.prefilled:,} new, "
        f"{timings.prefill_tok_s:,.0f}/s, {reused:,} reused · context {used:,} of {context:,}{ended}"
    )

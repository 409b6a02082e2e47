"""What goes to the terminal: answers to standard output, everything else to standard error."""

from collections.abc import Iterable

from rich.console import Console

from cli.escape import escape, say
from hybrid_rt.generation import Step, Timings


class AnswerPrinter:
    """Streams an answer. On a terminal the thinking is dimmed; elsewhere it stands between its tags."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.thinking = False
        self.answer_begun = False

    def show(self, steps: Iterable[Step]) -> Step | None:
        """Print `steps` as they come, then a line of figures on standard error. Returns the last step."""
        last = None
        for last in steps:
            self._write(escape(last.text), last.is_thinking)
        self.console.out("")
        if last is not None:
            say(describe(last.timings, last.finish_reason or "stop"))
        return last

    def _write(self, text: str, is_thinking: bool) -> None:
        if is_thinking != self.thinking:
            self._turn(is_thinking)
        if not is_thinking and not self.answer_begun:
            text = text.lstrip("\n")
            self.answer_begun = bool(text)
        if text:
            self.console.out(text, end="", style="dim" if is_thinking else None, highlight=False)
            self.console.file.flush()

    def _turn(self, is_thinking: bool) -> None:
        """Mark where thinking begins or ends."""
        self.thinking = is_thinking
        tag = "<think>\n" if is_thinking else "</think>\n\n"
        self.console.out("\n" if self.console.is_terminal and not is_thinking else tag, end="", style="dim")


def describe(timings: Timings, finish_reason: str) -> str:
    """One line about how long an answer took."""
    ended = {"length": ", cut at the limit", "cancelled": ", stopped"}.get(finish_reason, "")
    return (
        f"[{timings.prompt_tokens} prompt tokens at {timings.prefill_tok_s:.0f}/s, "
        f"{timings.tokens} tokens at {timings.decode_tok_s:.1f}/s{ended}]"
    )

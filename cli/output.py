"""What goes to the terminal: answers to standard output, everything else to standard error."""

from collections.abc import Iterable

from cli.escape import escape, say
from hybrid_rt.generation import Step, Timings


class AnswerPrinter:
    """Streams an answer as plain text, the thinking between its tags."""

    def __init__(self) -> None:
        self.thinking = False
        self.answer_begun = False

    def show(self, steps: Iterable[Step]) -> Step | None:
        """Print `steps` as they come, then a line of figures on standard error. Returns the last step."""
        last = None
        for last in steps:
            self._write(escape(last.text), last.is_thinking)
        print()
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
            print(text, end="", flush=True)

    def _turn(self, is_thinking: bool) -> None:
        """Mark where thinking begins or ends."""
        self.thinking = is_thinking
        print("<think>\n" if is_thinking else "</think>\n\n", end="")


def describe(timings: Timings, finish_reason: str) -> str:
    """One line about how long an answer took."""
    ended = {"length": ", cut at the limit", "cancelled": ", stopped"}.get(finish_reason, "")
    return (
        f"[{timings.prompt_tokens} prompt tokens at {timings.prefill_tok_s:.0f}/s, "
        f"{timings.tokens} tokens at {timings.decode_tok_s:.1f}/s{ended}]"
    )

"""Reasoning and answer: telling them apart in a model's output, and asking for one or the other in a prompt.

R1 writes `<think>` reasoning `</think>` answer. Newer templates write the opening tag themselves, at the end of the
prompt; with older ones the model does. It thinks once, first: a tag further on is text that mentions a tag.
"""

from dataclasses import dataclass

from hybrid_rt.tokenizer import THINK_CLOSE, THINK_OPEN, Tokenizer

# What ends the reasoning when its budget is spent, in the form in which R1 ends it.
END_OF_THINKING = f"\n{THINK_CLOSE}\n\n"
WAIT = "\nWait, "  # what stands in the place of an end that comes too early


@dataclass(frozen=True)
class Part:
    """A piece of output with the tags removed. Tags themselves count as thinking."""

    text: str
    is_thinking: bool


class ThinkingSplitter:
    """Follows one output. The thinking parts add up to the reasoning, the others to the answer.

    `starts_inside` says that the prompt opened the thinking (see `starts_inside`). `open_id` and `close_id` are the
    tags' tokens; where None, the tags are looked for in the text, also across pieces. Newlines around the tags belong
    to the tags.
    """

    def __init__(self, starts_inside: bool, open_id: int | None = None, close_id: int | None = None) -> None:
        self._open_id, self._close_id = open_id, close_id
        self._state = "inside" if starts_inside else "start"
        self._after_tag = starts_inside
        self._held = ""  # text that may turn out to be a tag, or that follows one
        self._reasoning: list[str] = []
        self._answer: list[str] = []

    @property
    def is_thinking(self) -> bool:
        """Whether the next token is a part of the reasoning, as far as is known."""
        return self._state == "inside"

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning).rstrip("\n")

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._answer)

    def feed(self, token_id: int, piece: str) -> Part:
        """What `piece`, the text that `token_id` completed, adds. Text after a closing tag may come a call later."""
        piece, self._held = self._held + piece, ""
        if self._state == "start":
            return self._feed_start(token_id, piece)
        if self._state == "inside":
            return self._feed_inside(token_id, piece)
        return self._part(piece, False)

    def flush(self, piece: str = "") -> Part:
        """What was held back, at the end of the output; `piece` is the detokenizer's rest."""
        piece, self._held = self._held + piece, ""
        return self._part(piece, self._state == "inside")

    def _feed_start(self, token_id: int, piece: str) -> Part:
        """Only blanks so far: the opening tag may still come."""
        begun = piece.lstrip()
        opens = begun.startswith(THINK_OPEN) if self._open_id is None else token_id == self._open_id
        if opens and begun.startswith(THINK_OPEN):
            self._state, self._after_tag = "inside", True
            return self._feed_inside(token_id, begun.removeprefix(THINK_OPEN))
        if not begun or self._open_id is None and THINK_OPEN.startswith(begun):
            self._held = piece
            return Part("", False)
        self._state = "answer"
        return self._part(piece, False)

    def _feed_inside(self, token_id: int, piece: str) -> Part:
        end = self._find_close(token_id, piece)
        if end < 0:
            keep = len(piece) - (_tag_start_length(piece, THINK_CLOSE) if self._close_id is None else 0)
            self._held = piece[keep:]
            return self._part(piece[:keep], True)
        self._held = piece[end + len(THINK_CLOSE) :]
        part = self._part(piece[:end], True)
        self._state, self._after_tag = "answer", True
        return part

    def _find_close(self, token_id: int, piece: str) -> int:
        if self._close_id is None:
            return piece.find(THINK_CLOSE)
        return piece.rfind(THINK_CLOSE) if token_id == self._close_id else -1

    def _part(self, text: str, is_thinking: bool) -> Part:
        if self._after_tag:
            text = text.lstrip("\n")
            self._after_tag = not text
        (self._reasoning if is_thinking else self._answer).append(text)
        return Part(text, is_thinking)


def starts_inside(prompt: str) -> bool:
    """Whether `prompt`, or just its end, leaves the thinking open."""
    return prompt.rstrip("\n").endswith(THINK_OPEN)


def open_thinking(prompt: str, think: bool | None) -> str:
    """`prompt` with the thinking opened (True), opened and closed again (False), or as the template left it (None).

    DeepSeek recommends opening it always: left to itself R1 sometimes answers without thinking (README of
    DeepSeek-R1, "Usage Recommendations").
    """
    if think is None or think and starts_inside(prompt):
        return prompt
    if think:
        return f"{prompt}{THINK_OPEN}\n"
    bare = prompt.rstrip("\n").removesuffix(THINK_OPEN) if starts_inside(prompt) else prompt
    return f"{bare}{THINK_OPEN}\n\n{THINK_CLOSE}\n\n"


def end_of_thinking_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens to feed when the thinking budget is spent."""
    return tokenizer.encode(END_OF_THINKING)


def _tag_start_length(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)

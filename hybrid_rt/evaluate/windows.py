"""A text as windows of tokens, the first half of each being context only.

A window of W tokens begins with the model's first token (bos), where it has one, and goes on with tokens of the text;
the next window goes on where it ended. Its tokens at positions W // 2 to W - 1 are scored, each as predicted from all
tokens before it in the window. Tokens that do not fill a last window are left out; a document shorter than one window
is a window of its own length. llama.cpp's perplexity cuts in the same way, but puts bos in place of a token and begins
one position later.
"""

import torch

from hybrid_rt.evaluate.statistics import LEAST_BLOCKS
from quant.errors import ContextError, Dsr1Error

DEFAULT_WINDOW = 512


def choose_window(asked: int | None, context: int) -> int:
    """The window asked for, or the smaller of 512 tokens and the context. Raises ContextError if it does not fit."""
    window = min(DEFAULT_WINDOW, context) if asked is None else asked
    if window < 2:
        raise ContextError(f"a window of {window} tokens is too small; give at least 2, a context and what follows it")
    if window > context:
        raise ContextError(
            f"a window of {window} tokens is more than the context, which holds {context}; "
            "give a smaller --window or a larger --context"
        )
    return window


def cut_all(documents: list[list[int]], bos: int | None, size: int) -> list[torch.Tensor]:
    """The windows of all documents, token ids: int64 [W] each, W at most `size`.

    Raises Dsr1Error if there are fewer than three: an interval comes from how windows differ.
    """
    windows = [window for ids in documents for window in cut(ids, bos, size)]
    if len(windows) < LEAST_BLOCKS:
        raise Dsr1Error(
            f"the text has {sum(map(len, documents))} token(s), which fill {len(windows)} window(s) of {size}, and "
            f"intervals need {LEAST_BLOCKS}; give a longer text or a smaller --window"
        )
    return windows


def cut(ids: list[int], bos: int | None, size: int) -> list[torch.Tensor]:
    """The windows of one document. If it begins with bos itself, it has no second one."""
    head = [] if bos is None else [bos]
    ids = ids[1:] if ids[:1] == head else ids
    step = min(size - len(head), len(ids))
    starts = range(0, len(ids) - step + 1, step) if step else ()
    return [torch.tensor(head + ids[start : start + step]) for start in starts]


def first_scored(window: torch.Tensor) -> int:
    """Position of the first token that is scored."""
    return len(window) // 2

"""From a text and one or two engines to the figures of `dsr1 eval`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_rt.engine import Engine
from hybrid_rt.evaluate.saved_reference import SavedReference, save_reference
from hybrid_rt.evaluate.scores import EngineReference, Reference, TokenScores, decodes, join, score_window
from hybrid_rt.evaluate.statistics import Estimate, mean, perplexity, share_of_blocks
from hybrid_rt.evaluate.text import Text
from hybrid_rt.evaluate.windows import choose_window, cut_all
from hybrid_rt.tokenizer import Tokenizer
from quant.errors import TokenizerError

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Comparison:
    """A model against a reference; likelihoods and divergences in nats a token.

    nll_difference: model less reference, token by token. kl: KL(reference || model); its quantiles and its maximum
    over tokens stand beside its mean. agreement: share of tokens where both find the same token likeliest. tail_mass:
    mean of what the reference gave to tokens that it does not tell apart, 0 unless it was read from a file.
    """

    reference_perplexity: Estimate
    nll_difference: Estimate
    kl: Estimate
    kl_median: float
    kl_90: float
    kl_99: float
    kl_max: float
    agreement: Estimate
    tail_mass: float


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    window: tokens of the longest one there may be. tokens: those that were scored. nll: mean, in nats a token.
    """

    window: int
    windows: int
    tokens: int
    nll: Estimate
    perplexity: Estimate
    comparison: Comparison | None


def ignore(done: int, total: int) -> None:
    """A Report that nobody reads."""


def evaluate(
    engine: Engine, text: Text, window: int | None = None, reference: Engine | None = None, report: Report = ignore
) -> Evaluation:
    """Let `engine` read `text` in windows, beside `reference` if there is one.

    window: tokens, by default 512 or the context. report: called with the windows that are done and their number.
    Raises ContextError for an impossible window, TokenizerError if the two models' tokens differ, Dsr1Error if the
    text is too short.
    """
    windows = windows_of(engine, text, window, reference)
    judge = None if reference is None else EngineReference(reference, decodes(engine))
    return summarize(score_all(engine, windows, judge, report), windows)


def evaluate_saved(engine: Engine, saved: SavedReference, report: Report = ignore) -> Evaluation:
    """The same against a reference in a file, on the windows of that file.

    Raises TokenizerError if its tokens are not the model's, ContextError if its windows are longer than the context.
    """
    saved.check(engine)
    windows = saved.windows()
    choose_window(max(map(len, windows)), engine.context)
    return summarize(score_all(engine, windows, saved, report), windows)


def evaluate_and_save(
    engine: Engine, text: Text, path: Path, window: int | None = None, report: Report = ignore
) -> Evaluation:
    """The figures of `engine` alone; what it predicts is written to `path`, for `evaluate_saved`."""
    windows = windows_of(engine, text, window, None)
    return summarize(save_reference(engine, windows, path, report), windows)


def windows_of(engine: Engine, text: Text, window: int | None, reference: Engine | None) -> list[torch.Tensor]:
    """Token ids of the windows, the same for both models: int64 [W] each. Raises as `evaluate`."""
    context = engine.context if reference is None else min(engine.context, reference.context)
    size = choose_window(window, context)
    documents = tokenize(text, engine.tokenizer)
    if reference is not None:
        check_tokens(engine, reference, documents == tokenize(text, reference.tokenizer))
    return cut_all(documents, engine.tokenizer.bos_id, size)


def score_all(
    engine: Engine, windows: Sequence[torch.Tensor], reference: Reference | None, report: Report
) -> list[TokenScores]:
    """The scores of each window."""
    parts = []
    for number, ids in enumerate(windows):
        report(number, len(windows))
        parts.append(score_window(engine, number, ids, reference))
    report(len(windows), len(windows))
    return parts


def tokenize(text: Text, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each document."""
    return [tokenizer.encode(document) for document in text.documents(tokenizer)]


def check_tokens(engine: Engine, reference: Engine, same_ids: bool) -> None:
    """Refuse models whose predictions are not about the same tokens. Raises TokenizerError.

    same_ids: whether the text is the same tokens for both.
    """
    mine, theirs = engine.tokenizer, reference.tokenizer
    rows, reference_rows = engine.config.vocab_size, reference.config.vocab_size
    if rows != reference_rows:
        what = f"vocabularies of {rows} and {reference_rows} tokens"
    elif mine.bos_id != theirs.bos_id or mine.backend.get_vocab() != theirs.backend.get_vocab():
        what = "different vocabularies"
    elif not same_ids:
        what = "tokenizers that cut the text differently"
    else:
        return
    raise TokenizerError(
        f"{engine.folder} and {reference.folder} have {what}, so their predictions cannot be compared; "
        "give --against the model that this one was made from"
    )


def summarize(parts: list[TokenScores], windows: Sequence[torch.Tensor]) -> Evaluation:
    """The figures over the scored tokens of all windows."""
    scores, sizes = join(parts), [len(part.nll) for part in parts]
    nll = mean(scores.nll, sizes)
    comparison = summarize_comparison(scores, sizes) if len(scores.kl) else None
    longest = max(map(len, windows))
    return Evaluation(longest, len(windows), len(scores.nll), nll, perplexity(nll), comparison)


def summarize_comparison(scores: TokenScores, sizes: Sequence[int]) -> Comparison:
    """As `summarize`, of what a reference is needed for."""
    kl = scores.kl.sort().values
    return Comparison(
        reference_perplexity=perplexity(mean(scores.reference_nll, sizes)),
        nll_difference=mean(scores.nll - scores.reference_nll, sizes),
        kl=mean(scores.kl, sizes),
        kl_median=quantile(kl, 0.5),
        kl_90=quantile(kl, 0.9),
        kl_99=quantile(kl, 0.99),
        kl_max=kl[-1].item(),
        agreement=share_of_blocks(scores.agrees, sizes),
        tail_mass=scores.tail.mean().item(),
    )


def quantile(ascending: torch.Tensor, q: float) -> float:
    """Between the two nearest values, linearly."""
    position = q * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return torch.lerp(ascending[below], ascending[above], position - below).item()

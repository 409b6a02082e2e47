"""From a text and one or two engines to the figures of `dsr1 eval`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hybrid_rt.engine import Engine
from hybrid_rt.evaluate.scores import TokenScores, join, score_window
from hybrid_rt.evaluate.statistics import Estimate, mean, perplexity, share
from hybrid_rt.evaluate.text import Text
from hybrid_rt.evaluate.windows import choose_window, cut_all
from hybrid_rt.tokenizer import Tokenizer
from quant.errors import TokenizerError

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Comparison:
    """A model against a reference; likelihoods and divergences in nats a token.

    nll_difference: model less reference, token by token. kl: KL(reference || model); its quantiles and its maximum
    over tokens stand beside its mean. agreement: share of tokens where both find the same token likeliest.
    """

    reference_perplexity: Estimate
    nll_difference: Estimate
    kl: Estimate
    kl_median: float
    kl_90: float
    kl_99: float
    kl_max: float
    agreement: Estimate


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
    context = engine.context if reference is None else min(engine.context, reference.context)
    size = choose_window(window, context)
    documents = tokenize(text, engine.tokenizer)
    if reference is not None:
        check_tokens(engine, reference, documents == tokenize(text, reference.tokenizer))
    windows = cut_all(documents, engine.tokenizer.bos_id, size)
    parts = []
    for number, ids in enumerate(windows):
        report(number, len(windows))
        parts.append(score_window(engine, ids, reference))
    report(len(windows), len(windows))
    return summarize(join(parts), size, len(windows))


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


def summarize(scores: TokenScores, window: int, windows: int) -> Evaluation:
    """The figures over all scored tokens of so many windows."""
    nll = mean(scores.nll)
    comparison = summarize_comparison(scores) if len(scores.kl) else None
    return Evaluation(window, windows, len(scores.nll), nll, perplexity(nll), comparison)


def summarize_comparison(scores: TokenScores) -> Comparison:
    """As `summarize`, of what a reference is needed for."""
    kl = scores.kl.sort().values
    return Comparison(
        reference_perplexity=perplexity(mean(scores.reference_nll)),
        nll_difference=mean(scores.nll - scores.reference_nll),
        kl=mean(kl),
        kl_median=quantile(kl, 0.5),
        kl_90=quantile(kl, 0.9),
        kl_99=quantile(kl, 0.99),
        kl_max=kl[-1].item(),
        agreement=share(int(scores.agrees.sum()), len(scores.agrees)),
    )


def quantile(ascending: torch.Tensor, q: float) -> float:
    """Between the two nearest values, linearly."""
    position = q * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return torch.lerp(ascending[below], ascending[above], position - below).item()

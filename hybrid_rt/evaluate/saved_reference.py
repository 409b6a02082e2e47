"""A reference's predictions in a file, so that a large model reads a text once for many comparisons.

An ordinary safetensors file. Of window N of the text, with S scored tokens and the k likeliest tokens of each:

    N.window   I32 [W]     its tokens
    N.ids      I32 [S, k]  the likeliest tokens, the likeliest first
    N.log_p    F32 [S, k]  their log probabilities
    N.nll      F32 [S]     -log of the probability of the token that came

What is left of the probability, the tail, counts as one event "another token", of the model as of the reference. So
the KL divergence is never above that over the whole vocabulary (data processing inequality), and below it by the
tail's mass times the divergence within the tail.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hybrid_rt.engine import Engine
from hybrid_rt.evaluate.scores import Compare, TokenScores, join, nll, predictions, score
from hybrid_rt.evaluate.windows import first_scored
from hybrid_rt.tokenizer import Tokenizer
from quant.errors import CheckpointError, Dsr1Error, TokenizerError
from quant.safetensors_file import SafetensorsFile
from quant.safetensors_writer import FilePlan, NewTensor, write_safetensors

FORMAT, VERSION = "dsr1-reference", "1"
DEFAULT_K = 64
SMALLEST_TAIL = 1e-9  # float32 log probabilities do not tell less from nothing
PARTS = ("window", "ids", "log_p", "nll")
Report = Callable[[int, int], None]  # told of windows that are done, and of how many
REMEDY = "make it again with --save-reference"


def save_reference(
    engine: Engine, windows: list[torch.Tensor], path: Path, report: Report, k: int = DEFAULT_K
) -> list[TokenScores]:
    """Let `engine` read `windows` and write what it predicts. Returns its own scores of each window.

    Raises StoreError when the disk refuses.
    """
    k, scores = min(k, engine.config.vocab_size), []
    metadata = {"format": FORMAT, "version": VERSION, "model": str(engine.folder), "windows": str(len(windows))}
    metadata["tokens"] = tokens_fingerprint(engine.tokenizer)
    tensors = [entry for number, window in enumerate(windows) for entry in _entries(number, window, k)]
    kept: dict[str, torch.Tensor] = {}

    def values(entry: NewTensor) -> Iterator[memoryview]:
        number, _, part = entry.name.partition(".")
        if part == PARTS[0]:
            report(int(number), len(windows))
            found, of_window = _read(engine, windows[int(number)], k)
            kept.update(found)
            scores.append(of_window)
        yield kept[part].contiguous().view(torch.uint8).numpy().reshape(-1).data

    write_safetensors(path, FilePlan.of(tensors, metadata), values)
    report(len(windows), len(windows))
    return scores


def _entries(number: int, window: torch.Tensor, k: int) -> list[NewTensor]:
    scored = len(window) - first_scored(window)
    kinds = (("I32", (len(window),)), ("I32", (scored, k)), ("F32", (scored, k)), ("F32", (scored,)))
    return [NewTensor(f"{number}.{part}", *kind) for part, kind in zip(PARTS, kinds, strict=True)]


def _read(engine: Engine, window: torch.Tensor, k: int) -> tuple[dict[str, torch.Tensor], TokenScores]:
    tops, scores = [], []
    for log_q, targets, _ in predictions(engine, window):
        tops.append(log_q.topk(k, dim=-1))
        scores.append(score(log_q, targets))
    joined = join(scores)
    found = {
        "window": window.to(torch.int32),
        "ids": torch.cat([top.indices for top in tops]).to(torch.int32),
        "log_p": torch.cat([top.values for top in tops]).float(),
        "nll": joined.nll.float(),
    }
    return found, joined


def tokens_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 over vocabulary and first token: predictions of models that share them are about the same tokens."""
    vocabulary = json.dumps([tokenizer.bos_id, sorted(tokenizer.backend.get_vocab().items())])
    return hashlib.sha256(vocabulary.encode()).hexdigest()


class SavedReference:
    """A file that was written by `save_reference` (`Reference`)."""

    def __init__(self, file: SafetensorsFile) -> None:
        self.file, self.count = file, int(file.metadata["windows"])

    @staticmethod
    def open(path: Path) -> "SavedReference":
        """Check kind, names, types and shapes. Raises Dsr1Error."""
        try:
            file = SafetensorsFile.open(path)
        except CheckpointError as error:
            raise Dsr1Error(f"{str(error).rpartition('; ')[0]}; {REMEDY}") from None
        told = file.metadata
        if told.get("format") != FORMAT or told.get("version") != VERSION or not told.get("windows", "").isdecimal():
            raise Dsr1Error(f"{path} is no file of a reference's predictions that this dsr1 reads; {REMEDY}")
        saved = SavedReference(file)
        if not 0 < saved.count <= len(file.tensors):
            raise Dsr1Error(f"{path} is damaged: it has {len(file.tensors)} tensors; {REMEDY}")
        for number in range(saved.count):
            _check_window(path, file, number)
        return saved

    def check(self, engine: Engine) -> None:
        """Raise TokenizerError unless the predictions are about the tokens of `engine`, Dsr1Error for damaged ones."""
        if self.file.metadata.get("tokens") != tokens_fingerprint(engine.tokenizer):
            raise TokenizerError(
                f"{engine.folder} has another vocabulary than the reference in {self.file.path}; give the reference of "
                "the model that this one was made from"
            )
        for number in range(self.count):
            for part in ("window", "ids"):
                ids = self._part(number, part)
                if ids.min() < 0 or ids.max() >= engine.config.vocab_size:
                    raise self._damaged(f"window {number} has a token that {engine.folder} does not have")
            if not (self._part(number, "log_p") <= 0).all() or not (self._part(number, "nll") >= 0).all():
                raise self._damaged(f"window {number} has probabilities that are none")

    def windows(self) -> list[torch.Tensor]:
        """Token ids: int64 [W] each."""
        return [self._part(number, "window").long() for number in range(self.count)]

    def _damaged(self, what: str) -> Dsr1Error:
        return Dsr1Error(f"{self.file.path} is damaged: {what}; {REMEDY}")

    def _part(self, number: int, part: str) -> torch.Tensor:
        return self.file.tensor(f"{number}.{part}")

    def comparing(self, number: int, window: torch.Tensor) -> Compare:
        ids, log_p = self._part(number, "ids").long(), self._part(number, "log_p").double()
        reference_nll = self._part(number, "nll").double()
        return lambda log_q, targets, rows: compare_top(log_q, targets, ids[rows], log_p[rows], reference_nll[rows])


def _check_window(path: Path, file: SafetensorsFile, number: int) -> None:
    specs = [file.tensors.get(f"{number}.{part}") for part in PARTS]
    shapes = [() if spec is None else spec.shape for spec in specs]
    scored = shapes[0][0] - shapes[0][0] // 2 if len(shapes[0]) == 1 else 0
    k = shapes[1][1] if len(shapes[1]) == 2 else 0
    if scored < 1 or k < 1 or shapes[1:] != [(scored, k), (scored, k), (scored,)]:
        raise Dsr1Error(f"{path} is damaged: window {number} is not whole; {REMEDY}")
    if [spec.dtype for spec in specs if spec] != ["I32", "I32", "F32", "F32"]:
        raise Dsr1Error(f"{path} is damaged: window {number} has other types than it should; {REMEDY}")


def compare_top(
    log_q: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor, reference_nll: torch.Tensor
) -> TokenScores:
    """The scores of log_q [n, vocab] against a reference's likeliest tokens: ids, log_p [n, k], likeliest first."""
    top_q = log_q.gather(-1, ids)
    tail_p, tail_q = _rest(log_p), _rest(top_q)
    within = (log_p.exp() * (log_p - top_q)).sum(-1)
    beyond = torch.where(tail_p > SMALLEST_TAIL, tail_p * (tail_p / tail_q.clamp_min(SMALLEST_TAIL)).log(), 0.0)
    agrees = (ids[:, 0] == log_q.argmax(-1)).double()
    return TokenScores(nll(log_q, targets), reference_nll, (within + beyond).clamp_min(0), agrees, tail_p)


def _rest(log_p: torch.Tensor) -> torch.Tensor:
    """What probabilities [n, k] leave of 1, never below 0."""
    return (1 - log_p.exp().sum(-1)).clamp_min(0)

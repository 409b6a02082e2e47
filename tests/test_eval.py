"""`dsr1 eval`: figures against plain arithmetic, and what it refuses."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from operator import add, mul, sub
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from cli.eval import EvalOptions, measure
from hybrid_rt import Engine
from hybrid_rt.evaluate.evaluation import evaluate, evaluate_and_save, evaluate_saved, quantile, windows_of
from hybrid_rt.evaluate.saved_reference import SavedReference, compare_top, save_reference
from hybrid_rt.evaluate.scores import ROWS
from hybrid_rt.evaluate.statistics import mean, paired, perplexity, share, share_of_blocks, student_t
from hybrid_rt.evaluate.text import DIALOGUES, Text, find_text
from hybrid_rt.evaluate.windows import cut, cut_all
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import ContextError, Dsr1Error, TokenizerError, UsageError
from tests.tiny_checkpoint import write_checkpoint
from tests.tiny_tokenizer import write_tokenizer
from tools.nano_r1.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")

PROSE = "Nothing that follows is meant to be likely; it only has to be long enough for some windows, and one left over."
WINDOW = 30


def load(folder: Path) -> Engine:
    return Engine.load(folder, dtype="float32", context=64, threads=1)


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Engine:
    return load(chat_folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Other weights, the same tokens."""
    folder = write_checkpoint(tmp_path_factory.mktemp("other"), seed=2)
    write_tokenizer(folder)
    return load(folder)


# Against plain arithmetic


def plain_windows(text: str) -> Iterator[list[int]]:
    """`<s>` and 29 bytes each; what is left over is left out."""
    ids = [4 + sorted(range(256), key=_byte_name).index(byte) for byte in text.encode()]
    for number in range(len(ids) // (WINDOW - 1)):
        yield [0, *ids[number * (WINDOW - 1) : (number + 1) * (WINDOW - 1)]]


def _byte_name(byte: int) -> int:
    """Where the tokenizer sorts a byte: those without a printable form stand behind all others (GPT-2)."""
    spare = [b for b in range(256) if b <= 32 or 127 <= b <= 160 or b == 173]
    return 256 + spare.index(byte) if byte in spare else byte


def plain_log_probs(engine: Engine, window: list[int]) -> torch.Tensor:
    """Log probabilities of the token at each position from 15 on: float64 [15, vocab]."""
    logits = engine.logits(window).double()
    return (logits - logits.exp().sum(-1, keepdim=True).log())[14:29]


def test_perplexity_is_that_of_the_second_halves(engine: Engine) -> None:
    nll = [
        -plain_log_probs(engine, window)[row, window[15 + row]].item()
        for window in plain_windows(PROSE)
        for row in range(15)
    ]
    found = evaluate(engine, Text(PROSE), WINDOW)
    assert (found.windows, found.tokens, found.window) == (3, 45, 30) == (len(PROSE) // 29, len(nll), WINDOW)
    average = math.fsum(nll) / 45
    means = [math.fsum(nll[first : first + 15]) / 15 for first in (0, 15, 30)]
    spread = math.sqrt(math.fsum((value - average) ** 2 for value in means) / 2 / 3)  # of three windows alike in size
    assert found.nll.value == pytest.approx(average, rel=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(average), rel=1e-5)
    assert found.perplexity.high - found.perplexity.value == pytest.approx(
        student_t(2) * spread * math.exp(average), rel=1e-4
    )
    assert found.comparison is None


def test_divergence_is_that_of_whole_distributions(engine: Engine, other: Engine) -> None:
    kl, agreed, difference = [], 0, []
    for window in plain_windows(PROSE):
        q, p = plain_log_probs(engine, window), plain_log_probs(other, window)
        kl += [sum(p[row].exp() * (p[row] - q[row])).item() for row in range(15)]
        agreed += sum(int(p[row].max(0).indices == q[row].max(0).indices) for row in range(15))
        difference += [(p - q)[row, window[15 + row]].item() for row in range(15)]
    found = evaluate(engine, Text(PROSE), WINDOW, other).comparison
    assert found is not None
    assert found.kl.value == pytest.approx(sum(kl) / 45, rel=1e-4) and found.kl.value > 0.1
    assert found.kl.low < found.kl.value < found.kl.high
    assert found.kl_max == pytest.approx(max(kl), rel=1e-4)
    assert found.kl_median == pytest.approx(sorted(kl)[22], rel=1e-4) and found.kl_90 < found.kl_99 < found.kl_max
    assert found.nll_difference.value == pytest.approx(sum(difference) / 45, rel=1e-4)
    assert found.agreement.value == agreed / 45
    alone = evaluate(other, Text(PROSE), WINDOW)
    assert found.reference_perplexity == alone.perplexity


def test_a_model_is_no_way_from_itself(engine: Engine) -> None:
    found = evaluate(engine, Text(PROSE), WINDOW, engine).comparison
    assert found is not None
    assert (found.kl.value, found.kl.high, found.kl_max, found.nll_difference.high) == (0, 0, 0, 0)
    assert found.agreement.value == found.agreement.high == 1 and found.agreement.low < 1


def test_neither_chunks_nor_many_rows_change_a_figure(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(engine, Text(2 * PROSE), 60)
    asked = []
    head = engine.head
    monkeypatch.setattr(engine, "prefill_chunk", 7)
    monkeypatch.setattr("hybrid_rt.evaluate.scores.ROWS", 4)
    monkeypatch.setattr(engine, "head", lambda states: asked.append(len(states)) or head(states))
    chunked = evaluate(engine, Text(2 * PROSE), 60)
    assert sum(asked) == 90 and max(asked) == 4 < ROWS
    assert chunked.nll.value == pytest.approx(whole.nll.value, rel=1e-4)


def test_a_store_is_some_way_from_its_checkpoint(chat_folder: Path, tmp_path: Path, engine: Engine) -> None:
    convert(Checkpoint.open(chat_folder), tmp_path / "store", "fast")
    found = evaluate(load(tmp_path / "store"), Text(4 * PROSE), WINDOW, engine).comparison
    assert found is not None
    assert 0 < found.kl.low < found.kl.value < 2 and 0 < found.agreement.value < 1


# A reference in a file


@pytest.fixture(scope="module")
def saved(other: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The predictions of `other`, as many as fit: 64 of 512."""
    path = tmp_path_factory.mktemp("saved") / "reference"
    assert evaluate_and_save(other, Text(PROSE), path, WINDOW) == evaluate(other, Text(PROSE), WINDOW)
    return path


def test_a_saved_reference_compares_as_the_model_does(engine: Engine, other: Engine, saved: Path) -> None:
    found, whole = evaluate_saved(engine, SavedReference.open(saved)), evaluate(engine, Text(PROSE), WINDOW, other)
    assert found.nll == whole.nll and found.comparison is not None and whole.comparison is not None
    assert found.comparison.agreement == whole.comparison.agreement
    assert found.comparison.nll_difference.value == pytest.approx(whole.comparison.nll_difference.value, abs=1e-5)
    assert 0 < found.comparison.kl.value < whole.comparison.kl.value
    assert 0 < found.comparison.tail_mass < 1 and whole.comparison.tail_mass == 0
    itself = evaluate_saved(other, SavedReference.open(saved)).comparison
    assert itself is not None and itself.kl_max < 1e-6 and itself.agreement.value == 1


def test_with_all_tokens_kept_nothing_is_lost(engine: Engine, other: Engine, tmp_path: Path) -> None:
    windows = windows_of(other, Text(PROSE), WINDOW, None)
    save_reference(other, windows, tmp_path / "all", lambda done, total: None, k=other.config.vocab_size)
    found = evaluate_saved(engine, SavedReference.open(tmp_path / "all")).comparison
    whole = evaluate(engine, Text(PROSE), WINDOW, other).comparison
    assert found is not None and whole is not None and found.tail_mass < 1e-6
    assert found.kl.value == pytest.approx(whole.kl.value, rel=1e-5)


def test_the_tail_counts_as_one_token() -> None:
    p, q = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).double(), torch.tensor([[0.4, 0.1, 0.2, 0.3]]).double()
    scores = compare_top(q.log(), torch.tensor([1]), torch.tensor([[0, 1]]), p.log()[:, :2], torch.ones(1))
    expected = 0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.1) + 0.3 * math.log(0.3 / 0.5)
    assert scores.kl.item() == pytest.approx(expected) and scores.tail.item() == pytest.approx(0.3)


def changed(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], **metadata: str) -> Path:
    """A copy with one tensor changed."""
    with safe_open(path, "pt") as file:
        tensors, told = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors[name] = change(tensors[name])
    save_file(tensors, path.with_name("changed"), told | metadata)
    return path.with_name("changed")


@pytest.mark.parametrize(
    ("name", "change", "metadata", "words"),
    [
        ("1.ids", lambda ids: ids + 512, {}, "token that"),
        ("1.window", lambda ids: ids - 512, {}, "token that"),
        ("0.log_p", lambda log_p: log_p * math.nan, {}, "probabilities that are none"),
        ("2.nll", lambda nll: nll[1:], {}, "window 2 is not whole"),
        ("2.nll", lambda nll: nll.int(), {}, "other types"),
        ("2.nll", lambda nll: nll, {"windows": "4"}, "window 3 is not whole"),
        ("2.nll", lambda nll: nll, {"windows": "9" * 20}, "damaged"),
        ("2.nll", lambda nll: nll, {"windows": "none"}, "no file of a reference"),
        ("2.nll", lambda nll: nll, {"version": "2"}, "no file of a reference"),
        ("2.nll", lambda nll: nll, {"tokens": "other"}, "another vocabulary"),
    ],
)
def test_a_saved_reference_that_is_damaged(
    saved: Path, engine: Engine, name: str, change: Any, metadata: dict[str, str], words: str
) -> None:
    with pytest.raises(Dsr1Error, match=words) as caught:
        evaluate_saved(engine, SavedReference.open(changed(saved, name, change, **metadata)))
    assert "make it again" in str(caught.value) or "give the reference" in str(caught.value)


def test_options_that_exclude_each_other() -> None:
    EvalOptions(tasks=True, against="x").check()
    for options in (
        EvalOptions(tasks=True, text="x"),
        EvalOptions(reference=Path("x"), against="x"),
        EvalOptions(reference=Path("x"), text="x"),
        EvalOptions(save_reference=Path("x"), against="x"),
    ):
        with pytest.raises(UsageError, match="cannot be given together"):
            options.check()


# Windows


def test_windows_by_hand() -> None:
    assert [w.tolist() for w in cut([5, 6, 7, 8, 9], 0, 3)] == [[0, 5, 6], [0, 7, 8]]
    assert [w.tolist() for w in cut([5, 6, 7, 8, 9], None, 2)] == [[5, 6], [7, 8]]
    assert [w.tolist() for w in cut([0, 5, 6], 0, 8)] == [[0, 5, 6]]
    assert [w.tolist() for w in cut_all([[5, 6, 7], [], [8], [9]], 0, 8)] == [[0, 5, 6, 7], [0, 8], [0, 9]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 70), st.sampled_from([None, 0]), st.integers(2, 12))
def test_windows_follow_each_other(count: int, bos: int | None, size: int) -> None:
    ids = list(range(1, count + 1))
    heads = 0 if bos is None else 1
    windows = [window.tolist() for window in cut(ids, bos, size)]
    assert [i for window in windows for i in window[heads:]] == ids[: sum(len(w) - heads for w in windows)]
    assert {len(w) for w in windows} == (set() if not ids else {min(size, count + heads)})
    assert count - sum(len(w) - heads for w in windows) < size - heads


# Intervals


def test_wilson_s_interval() -> None:
    few, most = share(0, 10), share(8, 10)
    assert (few.low, most.value) == (0, 0.8) and few.high == pytest.approx(0.2775, abs=1e-4)
    assert (most.low, most.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_a_mean_covers_the_truth_about_19_times_in_20() -> None:
    """Also where the values of a block are alike, which an interval from values alone would take for certainty."""
    generator = torch.Generator().manual_seed(0)
    sizes = [4, 6, 5, 5] * 5
    noise, shift = (torch.randn(2000, count, generator=generator, dtype=torch.float64) for count in (100, 20))
    draws = noise + shift.repeat_interleave(torch.tensor(sizes), dim=1) + 3
    found = [mean(values, sizes) for values in draws]
    assert 0.93 < sum(one.low <= 3 <= one.high for one in found) / 2000 < 0.97
    wide = perplexity(found[0])
    assert wide.low < math.exp(3) < wide.high


@pytest.mark.parametrize(("degrees", "point"), [(2, 4.303), (5, 2.571), (10, 2.228), (100, 1.984)])
def test_student_s_t(degrees: int, point: float) -> None:
    assert student_t(degrees) == pytest.approx(point, rel=0.04)


def test_shares_of_blocks() -> None:
    hits = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0] * 8, dtype=torch.float64)
    mixed, alike = share_of_blocks(hits, [8] * 8), share_of_blocks(hits, [4] * 16)
    assert mixed.value == alike.value == 0.5 and alike.high - alike.low > 1.4 * (mixed.high - mixed.low)
    assert share_of_blocks(torch.ones(64, dtype=torch.float64), [8] * 8) == share(8, 8)


def test_pairs_by_hand() -> None:
    model = [True] * 90 + [False] * 10
    reference = [True] * 85 + [False] * 5 + [True] * 1 + [False] * 9
    found = paired(model, reference)
    assert (found.only_model, found.only_reference) == (5, 1)
    assert found.p_value == pytest.approx(2 * (1 + 6) / 2**6)  # at most 1 of 6 by chance, on either side
    assert found.difference.value == 0.04 and found.difference.low < 0 < 0.04 < found.difference.high < 0.1
    assert paired(model, model).p_value == 1 and paired(model, model).difference.value == 0


def test_quantiles() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 10.0], dtype=torch.float64)
    assert [quantile(values, q) for q in (0, 0.5, 0.9, 1)] == pytest.approx([0, 1.5, 7.6, 10])


# The text that ships


def test_dialogues_are_true_and_kept_out_of_training() -> None:
    tasks = {"+": ("add", add), "-": ("subtract", sub), "*": ("multiply", mul)}
    content = DIALOGUES.read_text("ascii")
    sums = re.findall(r"</think>\n\n(\d+) ([-+*]) (\d+) = (-?\d+)\n", content)
    assert len(sums) == content.count("User: ") > 20
    for left, sign, right, result in sums:
        name, compute = tasks[sign]
        assert compute(int(left), int(right)) == int(result)
        assert TASKS[name].split((int(left), int(right))) == "test"


def test_dialogues_become_chats(engine: Engine) -> None:
    content = "User: 1 + 1?\nAssistant: <think>\n1+1\n</think>\n\n2\n\nUser: Again?\nAssistant: 2\n"
    content += "\nUser: Go on.\nAssistant: 3\n"
    assert Text(content, is_chat=True).documents(engine.tokenizer) == [
        "<s>user: 1 + 1?\n<think>\n1+1\n</think>\n\n2</s>",
        "<s>user: Again?\n<think>\n2</s>",
        "<s>user: Go on.\n<think>\n3</s>",
    ]
    assert Text(content).documents(engine.tokenizer) == [content]
    assert len(find_text(None, "store", "nano-r1-fp8").documents(engine.tokenizer)) > 20
    assert evaluate(engine, Text(content, is_chat=True)).windows == 3


# The command


def test_json_has_all_figures(chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(PROSE)
    options = EvalOptions(str(chat_folder), str(tmp_path / "text"), window=WINDOW, context=64, threads=1, as_json=True)
    measure(str(chat_folder), options)
    record = json.loads(capsys.readouterr().out)
    assert record["model"] == record["against"] == str(chat_folder) and record["dtype"] == "bfloat16"
    assert (record["windows"], record["tokens"]) == (3, 45)
    assert record["perplexity"]["low"] < record["perplexity"]["value"] == math.exp(record["nll"]["value"])
    assert record["comparison"]["kl"]["value"] == 0 and record["comparison"]["agreement"]["value"] == 1


def test_the_table(chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(PROSE)
    options = EvalOptions(
        str(chat_folder), str(tmp_path / "text"), window=WINDOW, context=64, threads=1, dtype="float32"
    )
    measure(str(chat_folder), options)
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split()[-4:] for line in out.splitlines()}
    value, low, to, high = lines["perplexity"]
    assert float(low) < float(value) < float(high) and to == "to"
    assert lines["perplexity of the reference"] == lines["perplexity"]
    assert lines["same likeliest token, %"] == ["100", "43.849", "to", "100"]  # 3 / (3 + 1.96²)
    assert lines["KL divergence, nats: mean"] == ["0", "0", "to", "0"]
    assert "45 tokens scored: the second halves of 3 windows of up to 30 tokens" in out


# What is refused


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no file"), (b" \n", "is empty"), (b"caf\xe9", r"not UTF-8 text \(byte 3"), (b"a", "1 token")],
)
def test_texts_that_cannot_be_measured(content: bytes | None, words: str, engine: Engine, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(Dsr1Error, match=words):
        evaluate(engine, find_text(str(tmp_path / "text")))


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(Dsr1Error, match="cannot be read"):
        find_text(str(tmp_path))


def test_another_model_needs_a_text(chat_folder: Path) -> None:
    with pytest.raises(Dsr1Error, match="--text"):
        measure(str(chat_folder), EvalOptions())


@pytest.mark.parametrize(("window", "words"), [(1, "too small"), (65, "holds 64")])
def test_impossible_windows(window: int, words: str, engine: Engine) -> None:
    with pytest.raises(ContextError, match=words):
        evaluate(engine, Text(PROSE), window)


def test_models_with_other_tokens(chat_folder: Path, tmp_path: Path, engine: Engine) -> None:
    larger = write_checkpoint(tmp_path / "larger", {"vocab_size": 528})
    write_tokenizer(larger)
    with pytest.raises(TokenizerError, match="528"):
        evaluate(engine, Text(PROSE), WINDOW, load(larger))
    swapped = Path(shutil.copytree(chat_folder, tmp_path / "swapped"))
    tokenizer = json.loads((swapped / "tokenizer.json").read_text("utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(TokenizerError, match="different vocabularies"):
        evaluate(engine, Text(PROSE), WINDOW, load(swapped))


def test_a_model_that_gives_no_numbers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "head", lambda states: torch.full((len(states), 512), torch.nan))
    with pytest.raises(Dsr1Error, match="no numbers"):
        evaluate(engine, Text(PROSE), WINDOW)

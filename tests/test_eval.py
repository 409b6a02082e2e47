"""`dsr1 eval`: figures against plain arithmetic, and what it refuses."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from operator import add, mul, sub
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.eval import measure
from hybrid_rt import Engine
from hybrid_rt.evaluate.evaluation import evaluate, quantile
from hybrid_rt.evaluate.scores import ROWS
from hybrid_rt.evaluate.statistics import mean, perplexity, share
from hybrid_rt.evaluate.text import DIALOGUES, Text, find_text
from hybrid_rt.evaluate.windows import cut, cut_all
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import ContextError, Dsr1Error, TokenizerError
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
    spread = math.sqrt(math.fsum((value - average) ** 2 for value in nll) / 44 / 45)
    assert found.nll.value == pytest.approx(average, rel=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(average), rel=1e-5)
    assert found.perplexity.high - found.perplexity.value == pytest.approx(1.96 * spread * math.exp(average), rel=1e-4)
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
    whole = evaluate(engine, Text(PROSE), 60)
    asked = []
    head = engine.head
    monkeypatch.setattr(engine, "prefill_chunk", 7)
    monkeypatch.setattr("hybrid_rt.evaluate.scores.ROWS", 4)
    monkeypatch.setattr(engine, "head", lambda states: asked.append(len(states)) or head(states))
    chunked = evaluate(engine, Text(PROSE), 60)
    assert sum(asked) == 30 and max(asked) == 4 < ROWS
    assert chunked.nll.value == pytest.approx(whole.nll.value, rel=1e-4)


def test_a_store_is_some_way_from_its_checkpoint(chat_folder: Path, tmp_path: Path, engine: Engine) -> None:
    convert(Checkpoint.open(chat_folder), tmp_path / "store", "fast")
    found = evaluate(load(tmp_path / "store"), Text(PROSE), WINDOW, engine).comparison
    assert found is not None
    assert 0 < found.kl.low < found.kl.value < 2 and 0 < found.agreement.value < 1


# Windows


def test_windows_by_hand() -> None:
    assert [w.tolist() for w in cut([5, 6, 7, 8, 9], 0, 3)] == [[0, 5, 6], [0, 7, 8]]
    assert [w.tolist() for w in cut([5, 6, 7, 8, 9], None, 2)] == [[5, 6], [7, 8]]
    assert [w.tolist() for w in cut([0, 5, 6], 0, 8)] == [[0, 5, 6]]
    assert [w.tolist() for w in cut_all([[5, 6, 7], [], [8]], 0, 8)] == [[0, 5, 6, 7], [0, 8]]


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
    draws = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    covered = sum(found.low <= 3 <= found.high for found in map(mean, draws))
    assert 0.93 < covered / 2000 < 0.97
    wide = perplexity(mean(draws[0]))
    assert wide.low < math.exp(3) < wide.high


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
    assert Text(content, is_chat=True).documents(engine.tokenizer) == [
        "<s>user: 1 + 1?\n<think>\n1+1\n</think>\n\n2</s>",
        "<s>user: Again?\n<think>\n2</s>",
    ]
    assert Text(content).documents(engine.tokenizer) == [content]
    assert len(find_text(None, "store", "nano-r1-fp8").documents(engine.tokenizer)) > 20
    assert evaluate(engine, Text(content, is_chat=True)).windows == 2


# The command


def test_json_has_all_figures(chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(PROSE)
    measure(str(chat_folder), str(chat_folder), str(tmp_path / "text"), WINDOW, context=64, threads=1, as_json=True)
    record = json.loads(capsys.readouterr().out)
    assert record["model"] == record["against"] == str(chat_folder) and record["dtype"] == "bfloat16"
    assert (record["windows"], record["tokens"]) == (3, 45)
    assert record["perplexity"]["low"] < record["perplexity"]["value"] == math.exp(record["nll"]["value"])
    assert record["comparison"]["kl"]["value"] == 0 and record["comparison"]["agreement"]["value"] == 1


def test_the_table(chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(PROSE)
    words = (str(chat_folder), str(chat_folder), str(tmp_path / "text"), WINDOW)
    measure(*words, context=64, threads=1, dtype="float32")
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split()[-4:] for line in out.splitlines()}
    value, low, to, high = lines["perplexity"]
    assert float(low) < float(value) < float(high) and to == "to"
    assert lines["perplexity of the reference"] == lines["perplexity"]
    assert lines["same likeliest token, %"] == ["100", "92.135", "to", "100"]  # 45 / (45 + 1.96²)
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
        measure(str(chat_folder))


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

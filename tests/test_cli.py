"""The `dsr1` command: what it prints where, and the status with which it ends."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

from cli.compiling import ERASE_LINE, show_compiling
from cli.main import main
from quant.errors import ConfigError

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "from cli.main import main; main()"]


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def dsr1(*arguments: object, stdin: str = "") -> Done:
    """Run the command in this process; its input is no terminal."""
    out, err = io.StringIO(), io.StringIO()
    words = ["dsr1", *map(str, arguments)]
    with redirect_stdout(out), redirect_stderr(err), patch("sys.argv", words), patch("sys.stdin", io.StringIO(stdin)):
        try:
            main()
            status = 0
        except SystemExit as left:
            status = int(left.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def refused(done: Done, status: int = 1) -> str:
    """The sentence with which the command refused, which must be all that it printed."""
    assert done.returncode == status, done.stderr
    assert not done.stdout
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.fixture
def copy(chat_folder: Path, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return Path(shutil.copytree(chat_folder, tmp_path / "model"))


def test_run_json(chat_folder: Path) -> None:
    done = dsr1("run", chat_folder, "--json", "-p", "Hello", "--max-new-tokens", 8, "--seed", 3)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert set(record) == {
        "text", "reasoning", "token_ids", "prompt_tokens", "finish_reason", "prefill_s", "decode_s",
        "prefill_tok_s", "decode_tok_s", "seed",
    }  # fmt: skip
    assert record["seed"] == 3 and record["prompt_tokens"] > 5
    assert 1 <= len(record["token_ids"]) <= 8
    assert record["finish_reason"] in ("length", "stop")
    again = json.loads(dsr1("run", chat_folder, "--json", "-p", "Hello", "--max-new-tokens", 8, "--seed", 3).stdout)
    assert again["token_ids"] == record["token_ids"]


def test_run_reads_standard_input(chat_folder: Path) -> None:
    done = dsr1("run", chat_folder, "--max-new-tokens", 4, "--gpu-mem", "24G", stdin="Hello\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<think>") and "prompt tokens" in done.stderr
    assert "without effect" in done.stderr


def test_a_default_context_is_clamped_with_a_line(chat_folder: Path) -> None:
    done = dsr1("run", chat_folder, "--json", "-p", "Hi", "--max-new-tokens", 1)
    assert done.returncode == 0
    assert "the model's maximum" in done.stderr


def test_a_context_beyond_the_maximum_is_refused(chat_folder: Path) -> None:
    message = refused(dsr1("run", chat_folder, "-p", "Hi", "--context", 10**7))
    assert "more than the model's maximum; give at most" in message


def test_refusals_of_options(chat_folder: Path) -> None:
    assert "is not a size" in refused(dsr1("run", chat_folder, "-p", "Hi", "--gpu-mem", "lots"))
    assert "finds no CUDA device here" in refused(dsr1("run", chat_folder, "-p", "Hi", "--device", "cuda"))
    assert "it needs --ram" in refused(dsr1("run", chat_folder, "-p", "Hi", "--ram", "1K"))
    assert "there is no device" in refused(dsr1("run", chat_folder, "-p", "Hi", "--device", "tpu"))
    assert "say it with --gpu-mem" in refused(dsr1("run", chat_folder, "-p", "Hi", "--device", "emulate"))
    assert "the prompt is empty" in refused(dsr1("run", chat_folder, "-p", "  "))
    assert "tokens and the context holds 8" in refused(dsr1("run", chat_folder, "-p", "Hello there", "--context", 8))


@pytest.mark.parametrize("words", [["run", "--nonsense"], ["nonsense"], ["run", "--top-p", "2"], ["chat"]])
def test_wrong_usage_is_status_2(words: list[str]) -> None:
    refused(dsr1(*words), status=2)


def test_no_such_model(tmp_path: Path) -> None:
    assert "no folder" in refused(dsr1("run", tmp_path / "nowhere", "-p", "Hi"))
    assert "has no config.json" in refused(dsr1("run", tmp_path, "-p", "Hi"))
    assert "Hub cache" in refused(dsr1("run", "deepseek-ai/DeepSeek-R1", "-p", "Hi"))


def test_an_unsupported_architecture(copy: Path) -> None:
    change_config(copy, model_type="llama")
    assert "model_type is 'llama'" in refused(dsr1("run", copy, "-p", "Hi"))


def test_an_unsupported_quantization(copy: Path) -> None:
    change_config(copy, quantization_config={"quant_method": "gptq"})
    assert "gptq" in refused(dsr1("run", copy, "-p", "Hi"))


def test_a_missing_shard(copy: Path) -> None:
    shard = shards(copy)[1]
    shard.unlink()
    assert shard.name in refused(dsr1("run", copy, "-p", "Hi"))


def test_a_truncated_shard(copy: Path) -> None:
    shard = shards(copy)[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert shard.name in refused(dsr1("run", copy, "-p", "Hi"))


def test_a_header_that_lies(copy: Path) -> None:
    shard = shards(copy)[0]
    content = shard.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"][1] += 2**40
    lying = json.dumps(header).encode()
    shard.write_bytes(len(lying).to_bytes(8, "little") + lying + content[8 + size :])
    message = refused(dsr1("run", copy, "-p", "Hi"))
    assert shard.name in message and name in message


def test_a_scale_that_is_absent(copy: Path) -> None:
    rename_tensor(copy, lambda name: name.endswith("weight_scale_inv"), lambda name: name.replace("_inv", "_inx"))
    message = refused(dsr1("run", copy, "-p", "Hi"))
    assert "weight_scale_in" in message and "model.layers" in message


def test_a_damaged_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in refused(dsr1("run", copy, "-p", "Hi"))
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(dsr1("run", copy, "-p", "Hi"))


def test_compiling_is_told(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("run", chat_folder, "--json", "-p", "Hi", "--max-new-tokens", 1)
    dsr1(*words)
    assert "compiling" not in dsr1(*words).stderr
    monkeypatch.setattr("hybrid_rt.engine.compile_ahead", lambda kernels, report: [report(n, 2) for n in range(3)])
    done = dsr1(*words)
    told = [line for line in done.stderr.splitlines() if "compiling" in line]
    assert [line.partition(": ")[2] for line in told] == ["1 of 2 ...", "2 of 2 ..."]
    json.loads(done.stdout)


def test_compiling_leaves_nothing_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    for done in range(3):
        show_compiling(done, 2)
    assert "\n" not in terminal.getvalue() and terminal.getvalue().endswith(f"2 of 2 ...{ERASE_LINE}")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        dsr1("run", tmp_path, "-p", "Hi", "--debug")


def test_a_process_of_its_own_ends_with_the_status(chat_folder: Path, tmp_path: Path) -> None:
    good = [*COMMAND, "run", str(chat_folder), "--json", "-p", "Hi", "--max-new-tokens", "2"]
    assert len(json.loads(subprocess.run(good, cwd=ROOT, capture_output=True, check=True).stdout)["token_ids"]) <= 2
    bad = subprocess.run([*COMMAND, "run", str(tmp_path), "-p", "Hi"], cwd=ROOT, capture_output=True)
    assert bad.returncode == 1 and bad.stderr.startswith(b"dsr1: ")


def test_an_interruption_is_status_130(chat_folder: Path) -> None:
    words = [*COMMAND, "run", str(chat_folder), "-p", "Hi", "--temperature", "3", "--top-p", "1"]
    words += ["--seed", "0"]  # an answer of 653 tokens; others may end before they are interrupted
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(8)  # the answer has begun
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rename_tensor(folder: Path, chosen, renamed) -> None:
    """Rename the first tensor that is `chosen`, in its shard's header and in the index; both names have one length."""
    index = (folder / "model.safetensors.index.json").read_text()
    name = next(name for name in json.loads(index)["weight_map"] if chosen(name))
    shard = folder / json.loads(index)["weight_map"][name]
    old, new = f'"{name}"'.encode(), f'"{renamed(name)}"'.encode()
    shard.write_bytes(shard.read_bytes().replace(old, new, 1))
    (folder / "model.safetensors.index.json").write_text(index.replace(old.decode(), new.decode()))

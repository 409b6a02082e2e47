import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from typer.testing import CliRunner

from cli.main import app
from quant.errors import StoreError, UsageError

runner = CliRunner()


def quantize(*arguments: str) -> Any:
    return runner.invoke(app, ["quantize", *arguments])


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "nano.gguf"
    done = quantize("nano-r1", str(path), "--to", "gguf", "--recipe", "q8_0", "--json")
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told.pop("seconds") >= 0
    assert told == {
        "path": str(path),
        "to": "gguf",
        "recipe": "q8_0",
        "source": "checkpoint",
        "bytes": path.stat().st_size,
        "encoded": 8_495_104,
        "taken": 0,
        "files": ["nano.gguf"],
    }
    assert len(gguf.GGUFReader(path).tensors) == 3 + 5 * 10 + 3 + 4 * 8


def test_compressed_tensors_from_a_store(tmp_path: Path) -> None:
    assert quantize("nano-r1", str(tmp_path / "store"), "--recipe", "fast").exit_code == 0
    done = quantize(str(tmp_path / "store"), str(tmp_path / "packed"), "--to", "compressed-tensors")
    assert done.exit_code == 0 and done.stdout == ""
    assert "compressed-tensors, recipe experts" in done.stderr and "encoded anew" not in done.stderr
    assert (tmp_path / "packed" / "config.json").exists()
    done = quantize(str(tmp_path / "store"), str(tmp_path / "nano.gguf"), "--to", "gguf")
    assert "100% of the quantised weights were decoded" in done.stderr


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--to", "onnx"), UsageError, "give store, gguf or compressed-tensors"),
        (("--to", "gguf", "--recipe", "fast"), StoreError, "q4_0, q4_k, q8_0"),
        (("--to", "compressed-tensors", "--recipe", "q8_0"), StoreError, "experts, linears"),
        (("--to", "gguf"), StoreError, "does not end in .gguf"),
        (("--to", "gguf", "--calibrate", "x.txt"), UsageError, "--calibrate would be without effect with --to gguf"),
        (("--to", "gguf", "--calibrate", "x", "--imatrix", "x"), UsageError, "--calibrate and --imatrix would be"),
        (("--to", "compressed-tensors", "--keep-source"), UsageError, "--keep-source are for models on the Hub"),
    ],
)
def test_what_cannot_be_done_is_told(tmp_path: Path, options: tuple[str, ...], error: type, message: str) -> None:
    done = quantize("nano-r1", str(tmp_path / "new"), *options)
    assert isinstance(done.exception, error) and message in str(done.exception)
    assert not list(tmp_path.iterdir())

"""kill -9 at random lines of an export, and the same call again: the same bytes, and nothing that loads before."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hybrid_rt.models import NANO_R1
from quant import conversion_run, convert, files, journal, pieces, store_file
from quant.checkpoint import Checkpoint
from quant.export import checkpoint as checkpoint_module
from quant.export import encoder, targets
from quant.export import gguf as gguf_module
from quant.export.compressed_tensors import find_recipe as packed_recipe
from quant.export.gguf_tensors import find_recipe as gguf_recipe
from tests.test_quantize import ROOT, SMALL, Killer, tree
from tests.tiny_checkpoint import write_checkpoint

WIDE = SMALL | {"hidden_size": 64, "moe_intermediate_size": 64, "vocab_size": 512}
LAST = 40  # lines, in which a file gets its name and the journal goes


class ExportKiller(Killer):
    modules = (checkpoint_module, gguf_module, encoder, targets, conversion_run, convert, files, journal, pieces)
    own = {str(module.__file__) for module in (*modules, store_file)}


def export(source: Path, to: str, path: Path) -> None:
    if to == "gguf":
        gguf_module.export_gguf(Checkpoint.open(source), path, gguf_recipe("q8_0"))
    else:
        checkpoint_module.export_checkpoint(Checkpoint.open(source), path, packed_recipe("experts"))


def export_in_child(source: Path, to: str, path: Path, line: int) -> int:
    """Export in a process of its own that is killed at `line`; the lines of all are left beside `path`."""
    child = os.fork()
    if not child:
        killer = ExportKiller(line)
        threading.settrace(killer)
        sys.settrace(killer)
        export(source, to, path)
        sys.settrace(None)
        path.with_suffix(".lines").write_text(str(killer.count))
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_and_continue(source: Path, to: str, folder: Path, kills: int) -> None:
    suffix = ".gguf" if to == "gguf" else ""
    whole = folder / f"whole{suffix}"
    assert export_in_child(source, to, whole, 0) == 0
    lines, draw = int(whole.with_suffix(".lines").read_text()), random.Random(0)
    for number in range(kills):
        line = draw.randint(1, lines) if number % 2 else draw.randint(lines - LAST, lines)
        (folder / str(number)).mkdir()
        path = folder / str(number) / whole.name
        assert export_in_child(source, to, path, line) in (signal.SIGKILL, 0)
        if not is_whole(path):
            export(source, to, path)


def is_whole(path: Path) -> bool:
    """Whether an export has ended; if not, nothing is there that a program could load."""
    if path.suffix == ".gguf":
        return path.exists()
    return (path / "config.json").exists() and not (path / journal.JOURNAL_NAME).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("to", ["gguf", "compressed-tensors"])
@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_anywhere_it_continues(tmp_path: Path, to: str, kills: int) -> None:
    source, work = write_checkpoint(tmp_path / "source", WIDE), tmp_path / "work"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO_R1 / name, source)
    work.mkdir()
    code = "import sys, pathlib, tests.test_export_kills as t\n"
    code += "t.kill_and_continue(pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(source), to, str(work), str(kills)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [whole] = (path for path in work.glob("whole*") if path.suffix != ".lines")
    for number in range(kills):
        left = [path for path in (work / str(number)).iterdir() if path.suffix != ".lines"]
        assert [path.name for path in left if path.suffix != ".part" or any(path.iterdir())] == [whole.name]
        if whole.is_dir():
            assert tree(left[0]) == tree(whole)
        else:
            assert left[0].read_bytes() == whole.read_bytes()

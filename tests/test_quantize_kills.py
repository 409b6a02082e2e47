"""kill -9 at random instants, and the same command again: the same bytes every time."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import StoreError
from quant.journal import JOURNAL_NAME
from quant.kernels import set_threads
from quant.store import Store
from tests.test_quantize import ROOT
from tests.tiny_checkpoint import NO_MTP, write_checkpoint

SMALL_MODEL = {"hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 16}
SMALL_MODEL |= {"num_hidden_layers": 3, "vocab_size": 1024} | NO_MTP
LARGE_MODEL = {"hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 1024, "n_routed_experts": 36}
LARGE_MODEL |= {"num_hidden_layers": 5, "vocab_size": 8192} | NO_MTP  # 1.0 GB in FP8


def sha256_tree(folder: Path) -> dict[str, str]:
    """A store's files by name, and their checksums."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def convert_in_child(source: Path, store: Path, kill_after_s: float | None) -> float:
    """Convert in a process of its own, with two threads, and kill it after a while; the seconds that it took."""
    begin = time.monotonic()
    child = os.fork()
    if not child:
        set_threads(2)
        convert(Checkpoint.open(source), store, "fast")
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, 9)
    status = os.waitpid(child, 0)[1]
    assert status in (0, 9), status
    return time.monotonic() - begin


def kill_and_resume(source: Path, work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Convert `kills` times with a kill at a random instant of the time that a whole conversion takes, and resume."""
    draw = random.Random(seed)
    convert_in_child(source, work / "whole", None)
    convert_in_child(source, work / "again", None)  # with kernels and files in memory
    whole, took = sha256_tree(work / "whole"), []
    counts = {"killed": 0, "begun": 0, "same": 0}
    for number in range(kills):
        store = work / f"store-{number}"
        took.append(convert_in_child(source, work / f"timed-{number}", None) if number % 10 == 0 else took[-1])
        convert_in_child(source, store, draw.uniform(0, 1.02 * took[-1]))
        unfinished = (store / JOURNAL_NAME).exists() or not (store / "dsr1-store.json").exists()
        counts["killed"] += unfinished
        counts["begun"] += (store / JOURNAL_NAME).exists()
        if unfinished:
            with pytest.raises(StoreError):
                Store.open(store)
            convert_in_child(source, store, None)
        counts["same"] += sha256_tree(store) == whole
        for folder in (store, work / f"timed-{number}"):
            subprocess.run(["rm", "-rf", str(folder)], check=True)
    return {**counts, "source_bytes": Checkpoint.open(source).nbytes, "whole_s": took}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("model", "kills"),
    [
        pytest.param(SMALL_MODEL, 4, id="16 MB"),
        pytest.param(LARGE_MODEL, 50, marks=pytest.mark.slow, id="1 GB"),
    ],
)
def test_killed_at_random_instants(tmp_path: Path, model: dict[str, int], kills: int) -> None:
    source = write_checkpoint(tmp_path / "source", model)
    code = "import json, sys, pathlib, torch, tests.test_quantize_kills as t\n"
    code += "torch.set_num_threads(1); work = pathlib.Path(sys.argv[2])\n"
    code += "print(json.dumps(t.kill_and_resume(pathlib.Path(sys.argv[1]), work, int(sys.argv[3]), 0)))"
    command = [sys.executable, "-c", code, str(source), str(tmp_path), str(kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["same"] == kills and found["killed"] > kills / 2

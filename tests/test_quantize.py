import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.quantize import quantize
from quant import conversion_run, files, journal, pieces, shard_reader, store_file, tensor_rows
from quant import convert as convert_module
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import CheckpointError, Dsr1Error, StoreError
from quant.journal import JOURNAL_NAME
from quant.manifest import MANIFEST_NAME
from quant.progress import Progress
from quant.report import REPORT_NAME
from quant.safetensors_file import FileSpan
from quant.store import Store, is_store
from tests.page_cache import cached_pages, skip_in_ram, write_to_disk
from tests.tiny_checkpoint import BF16, NO_MTP, tiny_config, tiny_tensors, write_checkpoint, write_files

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
SMALL = {"hidden_size": 48, "intermediate_size": 48, "moe_intermediate_size": 48, "q_lora_rank": 48, "vocab_size": 32}
SMALL |= {"kv_lora_rank": 48, "n_routed_experts": 4, "n_group": 2, "num_experts_per_tok": 2, "num_hidden_layers": 2}
SMALL |= NO_MTP
EXTRAS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE-MODEL")


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("source"), SMALL)
    for name in EXTRAS:
        (folder / name).write_text(f"This is {name}.")
    (folder / "README.md").write_text("not copied")
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of `source` with recipe q8, made in one go."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    convert(Checkpoint.open(source), folder, "q8")
    return tree(folder)


class StopError(Exception):
    """Raised by a test in the middle of a conversion."""


def convert_until(source: Path, folder: Path, stop: Callable[[Progress], bool]) -> None:
    """A conversion that ends with an error at the first step for which `stop` holds."""

    def progress(step: Progress) -> None:
        if stop(step):
            raise StopError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
        patch.setattr(conversion_run, "AHEAD", 0)  # or all may be done by then
        convert(Checkpoint.open(source), folder, "q8", progress)


def convert_up_to_the_manifest(source: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
        patch.setattr(convert_module, "Manifest", stop_here)
        convert(Checkpoint.open(source), folder, "q8")


def stop_here(*_: object) -> None:
    raise StopError


# The finished store


def test_the_model_s_files_are_copied(source: Path, whole: dict[str, bytes]) -> None:
    for name in ("config.json", *EXTRAS):
        assert whole[name] == (source / name).read_bytes()
    stored = {"layer-000.safetensors", "layer-001.safetensors", "top.safetensors", REPORT_NAME, MANIFEST_NAME}
    assert whole.keys() == {"config.json", *EXTRAS, *stored}
    assert json.loads(whole[MANIFEST_NAME])["files"].keys() == whole.keys() - {MANIFEST_NAME}


def test_progress_counts_every_weight(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    steps: list[Progress] = []
    (tmp_path / "empty").mkdir()  # an empty folder will do
    convert(Checkpoint.open(source), tmp_path / "empty", "q8", steps.append)
    assert tree(tmp_path / "empty") == whole  # no time, path or order of threads shows in it
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    tensors = [tensor for shard in Checkpoint.open(source).shards for tensor in shard.tensors.items()]
    weights = sum(stored.end - stored.begin for name, stored in tensors if not name.endswith("_scale_inv"))
    assert steps[0].done == 0 and {step.total for step in steps} == {steps[-1].done} == {weights}
    assert {step.tensor for step in steps} == {name for name, _ in tensors if not name.endswith("_scale_inv")}
    assert {step.file for step in steps} == {path.name for path in source.glob("*.safetensors")}


# Interrupted, and continued


def test_an_interrupted_conversion_continues(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    convert_until(source, folder, lambda step: step.done > step.total // 2)
    assert is_store(folder) and not (folder / "layer-001.safetensors").exists()
    with pytest.raises(StoreError, match="not finished"):
        Store.open(folder)
    steps: list[Progress] = []
    convert(Checkpoint.open(source), folder, "q8", steps.append)
    assert tree(folder) == whole
    assert steps[0].done > steps[0].total // 3  # what was done was not done again


def test_finished_files_are_left_alone(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Also if the conversion was killed between a file's new name and the journal's line of it."""
    folder, name = tmp_path / "store", "layer-000.safetensors"
    convert_up_to_the_manifest(source, folder)
    journal = folder / JOURNAL_NAME
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(line for line in lines if len(json.loads(line)) != 3))
    before = (folder / name).stat()
    convert(Checkpoint.open(source), folder, "q8")
    assert tree(folder) == whole
    after = (folder / name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_finished_file_whose_errors_are_not_noted_is_made_again(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder, name = tmp_path / "store", "layer-000.safetensors"
    convert_up_to_the_manifest(source, folder)
    journal = folder / JOURNAL_NAME
    first, *lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + b"".join(line for line in lines if json.loads(line)[0] != name))
    convert(Checkpoint.open(source), folder, "q8")
    assert tree(folder) == whole


def test_what_the_journal_notes_is_not_believed(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """After a power cut a part may have lost what it held, and the journal's end may be torn."""
    folder = tmp_path / "store"
    convert_until(source, folder, lambda step: step.done > step.total * 3 // 4)
    part = folder / "layer-001.safetensors.part"
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 3 : len(damaged) * 2 // 3] = bytes(len(damaged) * 2 // 3 - len(damaged) // 3)
    part.write_bytes(damaged)
    (folder / "top.safetensors.part").unlink()
    journal = folder / JOURNAL_NAME
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 20
    journal.write_bytes(b"".join(lines[:-3]) + lines[-3][:-9])
    convert_until(source, folder, lambda step: step.done > step.total * 9 // 10)  # lines after a torn one count, too
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())
    convert(Checkpoint.open(source), folder, "q8")
    assert tree(folder) == whole


def test_a_journal_that_was_only_begun(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_text('{"enc')
    convert(Checkpoint.open(source), tmp_path, "q8")
    assert tree(tmp_path) == whole


def test_only_the_same_conversion_continues(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    convert_until(source, folder, lambda step: step.done > 0)
    with pytest.raises(StoreError, match="another recipe"):
        convert(Checkpoint.open(source), folder, "accurate")
    with pytest.raises(StoreError, match="another source"):
        convert(Checkpoint.open(write_checkpoint(tmp_path / "other", SMALL, shards=1)), folder, "q8")
    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    (changed / "tokenizer.json").write_text("another")
    with pytest.raises(StoreError, match="another source"):
        convert(Checkpoint.open(changed), folder, "q8")
    (folder / JOURNAL_NAME).write_text('{"version": ')
    with pytest.raises(StoreError, match="damaged.*delete the folder"):
        convert(Checkpoint.open(source), folder, "q8")


def test_a_second_conversion_is_kept_out(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    told: list[str] = []

    def second(step: Progress) -> None:
        if not told:
            with pytest.raises(StoreError, match="another dsr1 is converting") as caught:
                convert(Checkpoint.open(source), tmp_path / "store", "q8")
            told.append(str(caught.value))

    convert(Checkpoint.open(source), tmp_path / "store", "q8", second)
    assert told


class Killer:
    """Kills this process before it runs the conversion's own line number `line`; with 0 it only counts them."""

    modules = (convert_module, conversion_run, files, journal, pieces, shard_reader, store_file, tensor_rows)
    own = {str(module.__file__) for module in modules}

    def __init__(self, line: int) -> None:
        self.line, self.count = line, 0

    def __call__(self, frame: Any, event: str, _argument: Any) -> "Killer | None":
        if frame.f_code.co_filename not in self.own:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.line:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def convert_in_child(source: Path, folder: Path, line: int) -> int:
    """Convert in a process of its own that is killed at `line`; the lines of all are left in `folder`.lines."""
    child = os.fork()
    if not child:
        killer = Killer(line)
        threading.settrace(killer)
        sys.settrace(killer)
        convert(Checkpoint.open(source), folder, "q8")
        sys.settrace(None)
        folder.with_suffix(".lines").write_text(str(killer.count))
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_and_continue(source: Path, folder: Path, kills: int) -> None:
    """Convert once in one go, then `kills` times with a kill at a random line, half of them among the last."""
    assert convert_in_child(source, folder / "whole", 0) == 0
    lines = int((folder / "whole.lines").read_text())
    draw = random.Random(0)
    drawn = {draw.randint(1, lines) if kill % 2 else draw.randint(lines - 30, lines) for kill in range(kills)}
    for line in drawn:
        # threads change turns as they like, so that there may be a few lines less
        assert convert_in_child(source, folder / f"killed at {line}", line) in (signal.SIGKILL, 0)
    for killed in (path for path in folder.glob("killed at *") if path.is_dir()):  # not the lines of one that was not
        if is_store(killed) and not (killed / MANIFEST_NAME).exists():
            with pytest.raises(StoreError, match="not finished"):
                Store.open(killed)
        if (killed / JOURNAL_NAME).exists() or not (killed / MANIFEST_NAME).exists():
            convert(Checkpoint.open(source), killed, "q8")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_anywhere_it_continues(source: Path, whole: dict[str, bytes], tmp_path: Path, kills: int) -> None:
    code = "import sys, pathlib, tests.test_quantize as t\n"
    code += "t.kill_and_continue(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(source), str(tmp_path), str(kills)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stores = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(stores) > kills / 2
    for store in stores:
        assert tree(store) == whole, store.name


# What is refused


def test_a_target_in_use_is_refused(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(source)
    (tmp_path / MANIFEST_NAME).write_bytes(whole[MANIFEST_NAME])
    with pytest.raises(StoreError, match="is a finished store"):
        convert(checkpoint, tmp_path, "q8")
    with pytest.raises(StoreError, match="is not empty"):
        convert(checkpoint, source, "q8")
    with pytest.raises(StoreError, match="is a file"):
        convert(checkpoint, tmp_path / MANIFEST_NAME, "q8")


def test_a_full_disk_is_told_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="the store takes .* and the disk of .* has .* free, .* too little"):
        convert(Checkpoint.open(source), tmp_path / "deep" / "store", "q8")
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    fields = tiny_config(SMALL | BF16)
    tensors = tiny_tensors(fields)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name][5, 7] = torch.nan
    write_files(tmp_path / "source", fields, tensors)
    with pytest.raises(CheckpointError, match=f"{name}.*cannot be quantised"):
        convert(Checkpoint.open(tmp_path / "source"), tmp_path / "store", "q8")


# Memory


def grown_by(folder: Path) -> int:
    """Bytes by which a conversion with small strips raises the peak of this process, which has converted before."""
    convert(Checkpoint.open(folder / "small"), folder / "first", "fast")
    pieces.PIECE_WEIGHTS = 1 << 18
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    convert(Checkpoint.open(folder / "large"), folder / "second", "fast")
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.slow
def test_memory_holds_strips_not_layers(source: Path, tmp_path: Path) -> None:
    large = {"hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": 64, "first_k_dense_replace": 0}
    write_checkpoint(tmp_path / "large", large | {"num_hidden_layers": 1} | NO_MTP)
    (tmp_path / "small").symlink_to(source)
    code = "import sys, pathlib, tests.test_quantize as t; print(t.grown_by(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80 * 2**20  # the layer: 200 MB in FP8, 110 MB in the store


# The command


def test_the_command_prints_one_object(
    source: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(str(source), str(tmp_path / "store"), "q8", jobs=1, as_json=True)
    told = capsys.readouterr()
    answer = json.loads(told.out)
    figures = {"bytes", "seconds", "source_bytes", "converted_bytes", "mb_s"}
    assert answer.keys() == {"store", "source", "revision", "recipe", "files"} | figures
    assert answer["source_bytes"] > answer["converted_bytes"] > 0.9 * answer["source_bytes"]  # without scales
    assert answer["mb_s"] == pytest.approx(answer["converted_bytes"] / 1e6 / answer["seconds"])
    assert answer["bytes"] == sum(map(len, whole.values())) - len(whole[MANIFEST_NAME])
    assert answer["files"] == sorted(whole.keys() - {MANIFEST_NAME}) and answer["recipe"] == "q8"
    assert tree(Path(answer["store"])) == whole
    begun = [line.split(":")[0] for line in told.err.splitlines() if not line.startswith("compiling kernels")]
    assert begun == sorted(path.name for path in source.glob("*.safetensors"))  # kernels may be compiled before


@pytest.mark.parametrize(
    ("src", "recipe", "words"),
    [("store", "q8", "is a store already"), ("source", "best", "no recipe 'best'"), ("nowhere", "q8", "no folder")],
)
def test_the_command_refuses(source: Path, tmp_path: Path, src: str, recipe: str, words: str) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / MANIFEST_NAME).touch()
    given = {"source": source}.get(src, tmp_path / src)
    with pytest.raises(Dsr1Error, match=words):
        quantize(str(given), str(tmp_path / "new"), recipe, jobs=1, as_json=False)
    assert not (tmp_path / "new").exists()


def test_what_was_read_or_written_is_not_kept_in_memory(source: Path, tmp_path: Path) -> None:
    skip_in_ram(tmp_path)
    path = tmp_path / "shard"
    write_to_disk(path, data := os.urandom(3 << 20))
    reader, buffer = shard_reader.ShardReader(path, len(data)), bytearray(len(data))
    assert cached_pages(path) > 0
    reader.read(FileSpan(path, 0, len(data)), memoryview(buffer))
    reader.close()
    assert buffer == data and cached_pages(path) == 0
    convert(Checkpoint.open(source), tmp_path / "store", "q8")
    assert [cached_pages(path) for path in (tmp_path / "store").glob("*.safetensors")] == [0] * 3

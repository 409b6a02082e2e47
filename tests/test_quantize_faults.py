"""`dsr1 quantize` when the disk, the source or the user gets in the way: a sentence, and then the same bytes."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quant import conversion_run, shard_reader, store_file
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import CheckpointError, Dsr1Error, StoreError
from quant.journal import Journal
from quant.manifest import MANIFEST_NAME
from quant.progress import Progress
from quant.store import Store
from tests.test_quantize import SMALL, tree
from tests.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("published"), SMALL)


@pytest.fixture(scope="module")
def whole(published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "store"
    convert(Checkpoint.open(published), folder, "q8")
    return tree(folder)


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(published, tmp_path / "source"))


def fails(source: Path, store: Path, at: Callable[[Progress], None] = lambda _: None) -> str:
    """What a conversion says that must fail, and leave nothing that opens."""
    with pytest.raises(Dsr1Error) as caught:
        convert(Checkpoint.open(source), store, "q8", at)
    with pytest.raises(StoreError):
        Store.open(store)
    assert "\n" not in str(caught.value) and "again" in str(caught.value)
    return str(caught.value)


def once(act: Callable[[], object], share: float = 0.5) -> Callable[[Progress], None]:
    """Progress that does something once a part of the work is done."""
    left = [act]

    def progress(step: Progress) -> None:
        if left and step.done > share * step.total:
            left.pop()()

    return progress


# The store's disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 160 KiB, for about half of the store."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def claim_free_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if others took the space after it was counted."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 2**40))  # type: ignore[attr-defined]


def test_a_disk_that_fills_up(
    source: Path, whole: dict[str, bytes], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_disk / "store"
    assert "too little" in fails(source, store) and not store.exists()  # it does not begin
    claim_free_space(monkeypatch)
    assert "No space left on device" in fails(source, store)
    assert "No space left on device" in fails(source, store)  # and again
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    convert(Checkpoint.open(source), store, "q8")
    assert tree(store) == whole


@pytest.mark.parametrize("function", ["write_at", "read_at"])
def test_a_disk_that_fails(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    calls, works = [0], getattr(store_file, function)

    def fail(*arguments: object) -> int:
        calls[0] += 1
        if calls[0] > 40:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return int(works(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(store_file, function, fail)
        if function == "read_at":
            calls[0] = 40
        assert "Input/output error" in fails(source, tmp_path / "store")
    convert(Checkpoint.open(source), tmp_path / "store", "q8")
    assert tree(tmp_path / "store") == whole


def test_a_flipped_bit_in_the_store(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Every file, every time: a bit of any byte."""
    convert(Checkpoint.open(source), tmp_path / "store", "q8")
    for number, name in enumerate(sorted(whole.keys() - {MANIFEST_NAME})):
        data = bytearray(whole[name])
        data[len(data) * (number + 1) // 9] ^= 1 << number % 8
        (tmp_path / "store" / name).write_bytes(data)
        with pytest.raises(Dsr1Error):
            Store.open(tmp_path / "store").verify(lambda _: None)
        (tmp_path / "store" / name).write_bytes(whole[name])
    Store.open(tmp_path / "store").verify(lambda _: None)


# The source


def test_a_source_that_cannot_be_read(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works, calls = shard_reader.read_at, [0]

    def fail(*arguments: object) -> int:
        calls[0] += 1
        if calls[0] > 30:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return int(works(*arguments))  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(shard_reader, "read_at", fail)
        told = fails(source, tmp_path / "store")
    assert "safetensors cannot be read (Input/output error)" in told
    convert(Checkpoint.open(source), tmp_path / "store", "q8")
    assert tree(tmp_path / "store") == whole


def test_a_shard_that_is_taken_away(source: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(source)
    (source / SHARD).unlink()
    with pytest.raises(Dsr1Error, match=f"{SHARD} cannot be read"):
        convert(checkpoint, tmp_path / "store", "q8")


def shrink(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)


def touch_up(path: Path) -> None:
    """Change a byte in place."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x01")


@pytest.mark.parametrize("change", [shrink, touch_up])
def test_a_shard_that_changes_while_it_is_read(
    source: Path, published: Path, whole: dict[str, bytes], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    told = fails(source, tmp_path / "store", once(lambda: change(source / SHARD)))
    assert SHARD in told and "changed while it was converted" in told
    shutil.copy(published / SHARD, source / SHARD)
    steps: list[Progress] = []
    convert(Checkpoint.open(source), tmp_path / "store", "q8", steps.append)
    assert steps[0].done == 0  # nothing of before counts
    assert tree(tmp_path / "store") == whole


def note_hashes(source: Path) -> None:
    """As `hf download --local-dir` leaves them."""
    folder = source / ".cache/huggingface/download"
    folder.mkdir(parents=True)
    for path in source.glob("*.safetensors"):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / f"{path.name}.metadata").write_text(f"{'a' * 40}\n{sha256}\n1700000000.0\n")


def link_to_blobs(source: Path) -> None:
    """As the Hub's cache has them."""
    blobs = source.parent / "blobs"
    blobs.mkdir()
    for path in source.glob("*.safetensors"):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(blob)


@pytest.mark.parametrize("note", [note_hashes, link_to_blobs])
def test_a_flipped_bit_in_a_source_whose_hash_is_known(
    source: Path, whole: dict[str, bytes], tmp_path: Path, note: Callable[[Path], None]
) -> None:
    note(source)
    data = bytearray((source / SHARD).read_bytes())
    data[len(data) // 2] ^= 4
    (source / SHARD).resolve().write_bytes(data)
    told = fails(source, tmp_path / "store")
    assert SHARD in told and "is damaged: its SHA-256 is not the one that the Hub gave for it" in told
    data[len(data) // 2] ^= 4
    (source / SHARD).resolve().write_bytes(data)
    convert(Checkpoint.open(source), tmp_path / "store", "q8")
    assert tree(tmp_path / "store") == whole


def test_a_header_that_promises_more_than_the_file(source: Path) -> None:
    shrink(source / SHARD)
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint.open(source)


# The user


def test_an_interruption_keeps_what_was_done(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion_run, "AHEAD", 0)  # or all may be done by then
    interrupt = once(lambda: os.kill(os.getpid(), signal.SIGINT), share=0.4)
    with pytest.raises(KeyboardInterrupt):
        convert(Checkpoint.open(source), tmp_path / "store", "q8", interrupt)
    steps: list[Progress] = []
    convert(Checkpoint.open(source), tmp_path / "store", "q8", steps.append)
    assert steps[0].done > 0.3 * steps[0].total
    assert tree(tmp_path / "store") == whole


# Power cuts: only what was flushed before is sure to be there


class Disk:
    """What is on the disk for sure: notes writes and flushes, and asks of each line of the journal that it be true."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.loose: dict[str, set[int]] = {}  # written after the last flush, by the name of the open file
        self.written: dict[str, set[int]] = {}
        self.noted: dict[str, set[int]] = {}  # where pieces begin that the journal has
        self.renamed: set[str] = set()  # without a flush of the folder since
        self.lines = self.files = 0
        write_at, fsync, replace, journal_write = store_file.write_at, os.fsync, Path.replace, Journal.write

        def written(file: Any, data: memoryview, begin: int) -> int:
            name = Path(file.name).name
            self.loose.setdefault(name, set()).add(begin)
            self.written.setdefault(name, set()).add(begin)
            return write_at(file, data, begin)

        def flushed(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.is_dir():
                self.renamed.clear()
            self.loose.pop(path.name, None)

        def moved(path: Path, target: Path) -> Path:
            assert path.name not in self.loose, "a name is given to what is not on the disk"
            pieces = self.written.get(path.name, set()) - {0}  # there lies the head
            assert pieces <= self.noted.get(path.name, set()), "a name is given before the errors are noted"
            self.renamed.add(Path(target).name)
            return replace(path, target)

        def noted(journal: Journal, lines: list[list[Any]]) -> None:
            for line in lines:
                self.check(line)
            journal_write(journal, lines)
            for line in lines:
                self.noted.setdefault(f"{line[0]}.part", set()).add(line[1])

        patch.setattr(store_file, "write_at", written)
        patch.setattr(os, "fsync", flushed)
        patch.setattr(Path, "replace", moved)
        patch.setattr(Journal, "write", noted)

    def check(self, line: list[Any]) -> None:
        part = f"{line[0]}.part"
        if len(line) == 5:
            assert line[1] in self.written[part] and line[1] not in self.loose.get(part, set())
            self.lines += 1
        else:
            assert part not in self.loose and line[0] not in self.renamed
            self.files += 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_the_journal_tells_of_what_is_on_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion_run, "SYNC_S", 0.0)
    disk = Disk(monkeypatch)
    manifest = convert(Checkpoint.open(source), tmp_path / "store", "accurate")
    assert disk.lines > 50 and disk.files == sum(name.endswith(".safetensors") for name in manifest.files)
    assert not disk.loose and not disk.renamed

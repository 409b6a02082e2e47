"""dsr1-quantize.json, which marks a folder as a conversion under way: of what, and how far it is.

Its first line is an object that says what is converted and how; only the same conversion continues. Each further
line is a list: a piece that is written, as [file, begin, bytes, CRC-32, errors], or a whole file, as [file, bytes,
SHA-256]. errors: sums as quant/encoding.py has them, exact to the last bit; [] where nothing is packed.

A line is added when what it tells of is on the disk, and those of all pieces of a file before that file gets its name.
The journal is the first file of a conversion and, being removed after the manifest is written, the last to change.
Where the system has locks, it also keeps a second conversion out.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import BinaryIO, NamedTuple

from quant.errors import StoreError
from quant.files import cannot_write, sync_folder
from quant.json_object import parse_json_object
from quant.manifest import MANIFEST_NAME, SHA256, FileRecord

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOURNAL_NAME = "dsr1-quantize.json"
ERROR_SUMS = 4  # of a piece that is packed, as `Errors` has them
Task = Mapping[str, str]
Key = tuple[str, int, int]  # of a piece: file, first byte, bytes


class Written(NamedTuple):
    """A piece that is written. errors: sums as in `Errors`; empty where nothing is packed."""

    crc32: int
    errors: tuple[float, ...]


class Journal:
    """How far a conversion is. pieces: those that are written, by place. files: those that are whole, by name."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.pieces: dict[Key, Written] = {}
        self.files: dict[str, FileRecord] = {}
        self._waiting: list[list[object]] = []

    def add_piece(self, key: Key, piece: Written) -> None:
        """Like `add_file`, to be written with the lines that `take` gives next."""
        self._waiting.append([*key, *piece])
        self.pieces[key] = piece

    def add_file(self, name: str, record: FileRecord) -> None:
        self._waiting.append([name, record.nbytes, record.sha256])
        self.files[name] = record

    def take(self) -> list[list[object]]:
        """The lines that wait, for `write` once what they tell of is on the disk."""
        lines, self._waiting = self._waiting, []
        return lines

    def write(self, lines: Iterable[list[object]]) -> None:
        """Put `lines` on the disk. Raises StoreError when it refuses."""
        try:
            self._file.write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self._path, error) from None

    def forget(self) -> None:
        """Keep the first line only: nothing that was written is of use."""
        self._file.seek(0)
        first = self._file.readline()
        self._file.truncate(len(first))
        self._file.flush()
        os.fsync(self._file.fileno())

    def read(self) -> None:
        """Take in what an earlier run has written. A line that a power cut has torn is dropped, with what follows."""
        position = self._file.tell()
        while line := self._file.readline():
            if not self._take_in(line):
                self._file.truncate(position)
                return
            position += len(line)

    def _take_in(self, line: bytes) -> bool:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            return False
        match entry:
            case [str(file), int(begin), int(nbytes), int(crc32), [*errors]] if _are_sums(errors):
                self.pieces[file, begin, nbytes] = Written(crc32, tuple(errors))
            case [str(file), int(nbytes), str(sha256)] if SHA256.fullmatch(sha256):
                self.files[file] = FileRecord(nbytes, sha256)
            case _:
                return False
        return True


def _are_sums(values: list[object]) -> bool:
    return len(values) in (0, ERROR_SUMS) and all(isinstance(value, float) and isfinite(value) for value in values)


def is_unfinished(folder: Path) -> bool:
    """Whether a conversion into `folder` was begun and has no manifest yet."""
    return (folder / JOURNAL_NAME).exists() and not (folder / MANIFEST_NAME).exists()


def begun_task(folder: Path) -> Task:
    """What the journal of an unfinished conversion says of it; empty if there is none that can be read."""
    try:
        with (folder / JOURNAL_NAME).open("rb") as file:
            return {key: str(value) for key, value in parse_json_object(file.readline()).items()}
    except (OSError, ValueError):
        return {}


def check_target(folder: Path) -> None:
    """Raise StoreError unless a conversion may begin or continue in `folder`."""
    if (folder / JOURNAL_NAME).exists():
        return
    if (folder / MANIFEST_NAME).exists():
        raise StoreError(f"{folder} exists and is a finished store; give another folder, or delete it first")
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} exists and is a file; give the name of a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(f"{folder} exists and is not empty; give a new or empty folder")


@contextmanager
def conversion(folder: Path, task: Task) -> Iterator[Journal]:
    """Hold `folder` for a conversion. task: what is converted and how. Without error, the journal is gone after it.

    Raises StoreError if the folder holds anything else than the same conversion, or another process works on it.
    """
    path = folder / JOURNAL_NAME
    try:
        check_target(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written ({error.strerror}); check its permissions or give another folder"
        ) from None
    with file:
        _lock(file, folder)
        yield _begin_or_continue(file, folder, task)
        if fcntl is not None:  # while the lock is held
            path.unlink(missing_ok=True)
    if fcntl is None:  # Windows removes closed files only
        path.unlink(missing_ok=True)
    sync_folder(folder)


def _lock(file: BinaryIO, folder: Path) -> None:
    """Held until the file is closed, also by a kill."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError(f"another dsr1 is converting into {folder}; wait for it, or give another folder") from None
    except OSError:  # a file system without locks
        return


def _begin_or_continue(file: BinaryIO, folder: Path, task: Task) -> Journal:
    journal = Journal(file, folder / JOURNAL_NAME)
    file.seek(0)
    first = file.readline()
    if not first and (folder / MANIFEST_NAME).exists():  # another process finished after `check_target`
        (folder / JOURNAL_NAME).unlink(missing_ok=True)
        check_target(folder)
    if not first.endswith(b"\n") and [path.name for path in folder.iterdir()] == [JOURNAL_NAME]:
        _begin(file, folder, task)
        return journal
    _check_task(first, folder, task)
    journal.read()
    return journal


def _begin(file: BinaryIO, folder: Path, task: Task) -> None:
    try:
        file.truncate(0)
        file.write((json.dumps(task, sort_keys=True) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
        sync_folder(folder)
    except OSError as error:
        raise cannot_write(folder / JOURNAL_NAME, error) from None


def _check_task(first: bytes, folder: Path, task: Task) -> None:
    try:
        begun = parse_json_object(first)
    except ValueError:
        raise StoreError(
            f"{folder / JOURNAL_NAME} is damaged, so the conversion cannot continue; delete the folder {folder} "
            "and quantize again"
        ) from None
    for key in sorted(begun.keys() | task.keys()):
        if begun.get(key) != task.get(key):
            raise StoreError(
                f"{folder} holds an unfinished conversion with another {key}; give the same checkpoint and recipe as "
                "before, or another folder, or delete this one"
            )

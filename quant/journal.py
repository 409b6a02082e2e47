"""dsr1-quantize.json, which marks a folder as a conversion under way: of what, so that only the same one continues.

It is the first file of a conversion and, being removed after the manifest is written, the last to change. Where the
system has locks, it also keeps a second conversion out.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from quant.errors import StoreError
from quant.files import sync_folder
from quant.json_object import parse_json_object
from quant.manifest import MANIFEST_NAME

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOURNAL_NAME = "dsr1-quantize.json"


def is_unfinished(folder: Path) -> bool:
    """Whether a conversion into `folder` was begun and has no manifest yet."""
    return (folder / JOURNAL_NAME).exists() and not (folder / MANIFEST_NAME).exists()


def check_target(folder: Path) -> None:
    """Raise StoreError unless a conversion may begin or continue in `folder`."""
    if (folder / JOURNAL_NAME).exists():
        return
    if (folder / MANIFEST_NAME).exists():
        raise StoreError(f"{folder} exists and is a finished store; give another folder, or delete it first")
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} exists and is a file; give a folder for the store")
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(f"{folder} exists and is not empty; give a new or empty folder for the store")


@contextmanager
def conversion(folder: Path, task: Mapping[str, str]) -> Iterator[None]:
    """Hold `folder` for a conversion. task: what is converted and how. Without error, the journal is gone after it.

    Raises StoreError if the folder holds anything else than the same conversion, or another process works on it.
    """
    try:
        check_target(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / JOURNAL_NAME).open("a+b")
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written ({error.strerror}); check its permissions or give another folder"
        ) from None
    with file:
        _lock(file, folder)
        _begin_or_continue(file, folder, task)
        yield
        if fcntl is not None:  # while the lock is held
            (folder / JOURNAL_NAME).unlink(missing_ok=True)
    if fcntl is None:  # Windows removes closed files only
        (folder / JOURNAL_NAME).unlink(missing_ok=True)
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


def _begin_or_continue(file: BinaryIO, folder: Path, task: Mapping[str, str]) -> None:
    file.seek(0)
    text = file.read()
    if not text and (folder / MANIFEST_NAME).exists():  # another process finished after `check_target`
        (folder / JOURNAL_NAME).unlink(missing_ok=True)
        check_target(folder)
    if not text and [path.name for path in folder.iterdir()] == [JOURNAL_NAME]:
        file.write((json.dumps(task, indent=2, sort_keys=True) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
        sync_folder(folder)
        return
    try:
        begun = parse_json_object(text)
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

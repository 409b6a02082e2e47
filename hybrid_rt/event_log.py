"""An append-only file of small JSON objects, each on the disk before `append` returns.

A line is `<first 16 hexadecimal digits of the SHA-256 of the JSON> <JSON>\n`. A kill can only leave a last line without
its end, which is cut off when the file is opened to be continued. A line that does not fit its checksum is left out
and counted. While a log is open a lock keeps other processes out; reading needs none.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from quant.errors import Dsr1Error
from quant.files import sync_folder
from quant.json_object import parse_json_object

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DIGITS = 16
MAX_BYTES = 1 << 30

Event = dict[str, Any]


class InUseError(Dsr1Error):
    """Another process has the file open."""


class EventLog:
    """One open file. Use `open`; it is closed by `close`, or by the process's end, however it comes."""

    def __init__(self, path: Path, file: BinaryIO, events: list[Event], damaged: int) -> None:
        self.path, self.events, self.damaged = path, events, damaged
        self._file = file

    @classmethod
    def open(cls, path: Path) -> "EventLog":
        """Continue the file `path`, or begin it; `events` are those that it holds, `damaged` the lines left out.

        Raises InUseError if another process has it open, Dsr1Error if it cannot be read or written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
            _lock(file, path)
            content = _read(file, path)
            whole = content[: content.rfind(b"\n") + 1]
            file.truncate(len(whole))
            file.seek(len(whole))
            sync_folder(path.parent)
        except OSError as error:
            raise Dsr1Error(
                f"{path} cannot be written ({error.strerror}); check the disk and the permissions of its folder"
            ) from None
        return cls(path, file, *_parse(whole))

    def append(self, event: Mapping[str, Any]) -> None:
        """Write an event; it is on the disk when this returns. Raises Dsr1Error if the disk refuses."""
        content = json.dumps(event, ensure_ascii=False).encode("utf-8", "surrogatepass")
        try:
            self._file.write(_digest(content) + b" " + content + b"\n")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise Dsr1Error(
                f"{self.path} cannot be written ({error.strerror}), so this is not kept; free some space on its disk"
            ) from None

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> list[Event]:
    """The events of a file that somebody else may have open; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            return _parse(_read(file, path))[0]
    except (OSError, Dsr1Error):
        return []


def is_in_use(path: Path) -> bool:
    """Whether a process has the file open as an EventLog."""
    try:
        with path.open("r+b") as file:
            _lock(file, path)
    except InUseError:
        return True
    except OSError:
        return False
    return False


def _lock(file: BinaryIO, path: Path) -> None:
    """Held until the file is closed, also by a kill."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUseError(
            f"the conversation {path.stem} is open in another dsr1; leave it there, or begin a new one"
        ) from None
    except OSError:  # a file system without locks
        return


def _read(file: BinaryIO, path: Path) -> bytes:
    if os.fstat(file.fileno()).st_size > MAX_BYTES:
        raise Dsr1Error(f"{path} is larger than {MAX_BYTES >> 20} MiB, so it is no conversation; move it away")
    pieces: Iterable[bytes] = iter(lambda: file.read(1 << 24), b"")
    return b"".join(pieces)


def _parse(content: bytes) -> tuple[list[Event], int]:
    events, damaged = [], 0
    for line in content.split(b"\n")[:-1]:
        digest, _, payload = line.partition(b" ")
        try:
            if digest != _digest(payload):
                raise ValueError
            events.append(parse_json_object(payload))
        except ValueError:
            damaged += 1
    return events, damaged


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:DIGITS].encode()

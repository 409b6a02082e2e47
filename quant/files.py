"""Files that are there whole or not at all, and their checksums."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from quant.errors import StoreError

PART_SUFFIX = ".part"
READ_BYTES = 1 << 24

_position = threading.Lock()  # of files, where reading at a place means going there first

Report = Callable[[int], None]  # told of bytes that are done


def ignore(done: int) -> None:
    """A Report for nobody."""


class HashedFile:
    """A file that is being written from front to back. position: bytes so far."""

    def __init__(self, file: BinaryIO, report: Report) -> None:
        self._file, self._report = file, report
        self._hash = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        """data: bytes, or a contiguous view of them."""
        self._file.write(data)
        self._hash.update(data)
        self.position += len(data)
        self._report(len(data))

    @property
    def sha256(self) -> str:
        """Checksum of what has been written, in hexadecimal."""
        return self._hash.hexdigest()


@contextmanager
def new_file(path: Path, report: Report = ignore) -> Iterator[HashedFile]:
    """Write `path` under a temporary name beside it; only when the body ends without error does it appear.

    It and its name are on the disk by then. Raises StoreError when the disk refuses.
    """
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with part.open("wb") as file:
            yield HashedFile(file, report)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> StoreError:
    """What to tell when the disk refuses."""
    return StoreError(
        f"{path} cannot be written ({error.strerror}); check the free space and the permissions of its folder, "
        "then give the same command again"
    )


def read_at(file: FileIO, buffer: memoryview, begin: int) -> int:
    """Read from byte `begin` on, as many as the system gives at once; 0 at the end. Threads may do so at once."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [buffer], begin)
    with _position:
        file.seek(begin)
        return file.readinto(buffer) or 0


def write_at(file: FileIO, data: memoryview, begin: int) -> int:
    """Write at byte `begin`, as many as the system takes at once. Threads may do so at once."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), data, begin)
    with _position:
        file.seek(begin)
        return file.write(data) or 0


def let_go(descriptor: int, begin: int, nbytes: int) -> None:
    """Say that bytes need not stay in memory: Linux begins to write what is not on the disk yet, and frees the rest.

    Memory that was freed is used again at once, which costs far less than memory never used before. Pages stay that
    programs have mapped, that lie only partly within, or that are being written: for these, say it again later.
    """
    if hasattr(os, "posix_fadvise") and nbytes:  # 0 would mean the whole file
        with suppress(OSError):  # advice: some file systems take none
            os.posix_fadvise(descriptor, begin, nbytes, os.POSIX_FADV_DONTNEED)


@contextmanager
def put_in_place(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, of this thread alone, to write a file to; put in place when the body ends well.

    By then it is on the disk. Raises OSError.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{PART_SUFFIX}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # what file systems say that cannot
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path, report: Report = ignore) -> str:
    """Checksum of a file, in hexadecimal; `report` is told of the bytes read. Raises StoreError if it is unreadable."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
                report(len(data))
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); check the disk and its permissions") from None
    return digest.hexdigest()

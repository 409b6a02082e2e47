"""A file of a store while its pieces are written, in any order; it gets its name when it is whole.

Its checksum follows the pieces: what lies before the first piece that is missing is settled, and read back soon after
it was written, while it is still in memory. So what counts is what the file holds, not what was meant to be written.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from quant.errors import StoreError
from quant.files import PART_SUFFIX, cannot_write, let_go, read_at, sync_folder, write_at
from quant.manifest import FileRecord
from quant.pieces import Target

READ_BYTES = 1 << 20


class PlannedFile(Protocol):
    """A file before it is written. head: its first bytes. nbytes: of all of it."""

    @property
    def head(self) -> bytes: ...
    @property
    def nbytes(self) -> int: ...


class StoreFile:
    """Threads may write and read at once; `mark`, `settled` and `is_whole` are for one thread."""

    def __init__(self, path: Path, plan: PlannedFile, targets: Sequence[Target]) -> None:
        """Open the part that an earlier run has left, or begin one. targets: from front to back."""
        self.path, self.nbytes, self.targets = path, plan.nbytes, targets
        self._part = path.with_name(path.name + PART_SUFFIX)
        self._done: set[int] = set()  # where targets begin
        self._first_missing = 0
        self._hash, self.hashed = hashlib.sha256(), 0
        try:
            self._file = self._part.open("r+b" if self._part.exists() else "w+b", buffering=0)
            self._file.truncate(plan.nbytes)  # what is not written reads as zeros
        except OSError as error:
            raise cannot_write(path, error) from None
        self.write(0, memoryview(plan.head))

    def write(self, begin: int, data: memoryview) -> None:
        """Have `data` at byte `begin`, soon on the disk, too. Raises StoreError when that refuses."""
        done = 0
        try:
            while done < len(data):
                done += write_at(self._file, data[done:], begin + done)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        let_go(self._file.fileno(), begin, done)

    def crc32(self, target: Target) -> int:
        """Of what lies at a target's place."""
        value = 0
        for data in self._read(target.begin, target.begin + target.nbytes):
            value = zlib.crc32(data, value)
        return value

    def mark(self, target: Target) -> None:
        """Note that a target is written."""
        self._done.add(target.begin)
        while self._first_missing < len(self.targets) and self.targets[self._first_missing].begin in self._done:
            self._first_missing += 1

    def is_done(self, target: Target) -> bool:
        return target.begin in self._done

    @property
    def settled(self) -> int:
        """Bytes from the start that do not change any more."""
        return self.nbytes if self.is_whole else self.targets[self._first_missing].begin

    @property
    def is_whole(self) -> bool:
        return self._first_missing == len(self.targets)

    def hash_on(self, end: int) -> None:
        """Take up to byte `end` into the checksum; one call at a time."""
        for data in self._read(self.hashed, end):
            self._hash.update(data)
        self.hashed = end

    def sync(self) -> None:
        """Put what was written on the disk, and out of memory what was read back."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from None
        let_go(self._file.fileno(), 0, self.hashed)

    def finish(self) -> FileRecord:
        """Give the whole file its name, on the disk too."""
        self.sync()
        try:
            self._part.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.close()
        return FileRecord(self.nbytes, self._hash.hexdigest())

    def close(self) -> None:
        self._file.close()

    def _read(self, begin: int, end: int) -> Iterator[memoryview]:
        """Bytes begin to end, in pieces that are valid until the next one."""
        buffer = memoryview(bytearray(min(READ_BYTES, end - begin)))
        while begin < end:
            try:
                count = read_at(self._file, buffer[: end - begin], begin)
            except OSError as error:
                raise StoreError(
                    f"{self._part} cannot be read back ({error.strerror}); check the disk, then give the same command "
                    "again"
                ) from None
            if not count:
                raise StoreError(f"{self._part} became shorter; let nothing else write there, and quantize again")
            yield buffer[:count]
            begin += count

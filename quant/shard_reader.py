"""Reading a checkpoint's shard for a conversion: with read calls, never mapped.

A mapped file that shrinks, or whose disk fails, kills the process (SIGBUS) where a read call gives an error that can be
told. Its pages would also count as the process's memory, and nothing is read twice. So mapping would gain nothing.
"""

import os
from contextlib import suppress
from pathlib import Path

from quant.errors import CheckpointError
from quant.files import let_go, read_at
from quant.safetensors_file import FileSpan


class ShardReader:
    """An open shard. Threads may read it at once."""

    def __init__(self, path: Path, nbytes: int) -> None:
        """nbytes: of the file, as its header was checked against. Raises CheckpointError if it cannot be read."""
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise _unreadable(path, error) from None
        self._opened = os.fstat(self._file.fileno())
        if self._opened.st_size != nbytes:
            raise _changed(path, f"it had {nbytes} bytes, now {self._opened.st_size}")

    def read(self, span: FileSpan, buffer: memoryview) -> None:
        """Fill `buffer`, span.nbytes long; the system need not keep what was read.

        Raises CheckpointError where the file ends before, or the disk fails.
        """
        done = 0
        while done < span.nbytes:
            try:
                count = read_at(self._file, buffer[done:], span.begin + done)
            except OSError as error:
                raise _unreadable(self.path, error) from None
            if not count:
                raise _changed(self.path, f"it ends at byte {span.begin + done} now, in the middle of a tensor")
            done += count
        let_go(self._file.fileno(), span.begin, span.nbytes)

    def will_need(self, span: FileSpan) -> None:
        """Have the system read ahead, where it can."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._file.fileno(), span.begin, span.nbytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file was written since it was opened: what was read is of no use then."""
        try:
            now = self.path.stat()
        except OSError as error:
            raise _unreadable(self.path, error) from None
        before = self._opened
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (before.st_ino, before.st_size, before.st_mtime_ns):
            raise _changed(self.path, "it was written meanwhile")

    def close(self) -> None:
        self._file.close()


class ChangedError(CheckpointError):
    """A shard changed under the conversion, so nothing that was made of it can stay."""


def _changed(path: Path, how: str) -> ChangedError:
    return ChangedError(
        f"{path} changed while it was converted ({how}); let nothing write to the checkpoint, download this file again "
        "if it is damaged, then give the same command again: it starts over"
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({error.strerror}); check the disk and its permissions, then give the same command "
        "again: it continues where it was"
    )

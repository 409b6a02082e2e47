"""Where the shards of a checkpoint come from: a folder, or whatever else can bring one after the other."""

import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

from quant.errors import CheckpointError
from quant.files import sha256_of
from quant.progress import Fetching
from quant.safetensors_file import FileSpan
from quant.shard_reader import ShardReader

SHA256 = re.compile("[0-9a-f]{64}")
LOCAL_METADATA = Path(".cache/huggingface/download")  # of `hf download --local-dir`, beside the files


class Shards:
    """Brings shards, named by their paths in the checkpoint, one ahead of the one in work. These lie in a folder.

    task: what tells this source from others, for the journal.
    """

    task: Mapping[str, str] = {}

    def __init__(self) -> None:
        self._order: list[Path] = []
        self._coming: dict[Path, Future[Path]] = {}

    def disk_bytes(self, order: Sequence[Path]) -> int:
        """Room that shards take on the disk of the store at any time, if these are wanted."""
        return 0

    def begin(self, order: Sequence[Path]) -> None:
        """Be told which shards will be wanted, in which order, and set out for the first."""
        self._order = list(order)
        self._bring_next()

    def fetch(self, path: Path, wait_s: float) -> Path | None:
        """The file of the next shard, checked against what is known of its content; None if it is still on its way."""
        try:
            found = self._coming[path].result(wait_s)
        except TimeoutError:
            return None
        del self._coming[path]
        self._bring_next()
        return found

    def bring(self, path: Path) -> Path:
        """Get one shard's file and check it, in a thread of its own."""
        if (known := known_sha256(path)) is not None:
            check_sha256(path, known)
        return path

    def read(self, span: FileSpan, nbytes: int) -> bytes:
        """Some bytes of a shard of `nbytes`, be it in work or not."""
        buffer = bytearray(span.nbytes)
        with closing(ShardReader(span.path, nbytes)) as reader:
            reader.read(span, memoryview(buffer))
        return bytes(buffer)

    def drop(self, path: Path) -> None:
        """Be told that nothing of a shard is needed any more."""

    def fetching(self) -> Fetching | None:
        """What is on its way from elsewhere."""
        return None

    def finish(self) -> None:
        """Be told that the store is whole."""

    def _bring_next(self) -> None:
        """In a thread that ends with the process: nobody waits for a download after an interruption."""
        if self._order:
            path, coming = self._order.pop(0), Future[Path]()
            self._coming[path] = coming
            threading.Thread(target=self._deliver, args=(path, coming), name="dsr1-shard", daemon=True).start()

    def _deliver(self, path: Path, coming: Future[Path]) -> None:
        try:
            coming.set_result(self.bring(path))
        except BaseException as error:
            coming.set_exception(error)


def known_sha256(path: Path) -> str | None:
    """The checksum that the Hub gave for a downloaded file, if it is known.

    In the Hub's cache files are links to others, named by their checksum; `hf download --local-dir` notes it beside.
    """
    target = path.resolve().name
    if path.is_symlink() and SHA256.fullmatch(target):
        return target
    try:
        lines = (path.parent / LOCAL_METADATA / f"{path.name}.metadata").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return lines[1] if len(lines) > 1 and SHA256.fullmatch(lines[1]) else None


def check_sha256(path: Path, known: str) -> None:
    """Raise CheckpointError unless a file has the checksum that the Hub gave for it."""
    if sha256_of(path) != known:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one that the Hub gave for it ({known}); delete this file and "
            "download it again, then give the same command again"
        )

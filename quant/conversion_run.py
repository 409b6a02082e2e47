"""One run of a conversion: who does what, and when something counts as done.

    this thread                     workers, one a core          the keeper
    waits for a shard, opens it
    hands out pieces in order   ->  read, convert, write
    marks what is written       <-  the checksum and the errors of each target
    hands out settled bytes     ->  read back into SHA-256
    every few seconds               ...                      ->  fsync what was written, then the journal's lines
    file whole and read back                                 ->  fsync, rename, fsync the folder; then its line
    last piece of a shard: checks that it did not change     ->  after the lines of its pieces: the shard may go

Reading, converting and writing overlap because each worker does all three for its own piece, and the system reads ahead
what is handed out and writes back behind. How much columns count this thread asks as it hands a piece out; where layers
of the model must run first (hybrid_rt/calibration.py), they run here, and have all cores once workers are idle. What
becomes of a piece is for the encoder to say: a store's formats (quant/convert.py), or another program's (quant/export).
Only this thread touches the state below. On an error or an interruption what workers have finished is still written
down.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import torch

from quant.encoding import Errors
from quant.errors import CheckpointError, Dsr1Error
from quant.formats import QuantTensor
from quant.journal import Journal, Written
from quant.kernels.threads import thread_count
from quant.pieces import Piece, Published, Target, source_bytes
from quant.progress import Progress
from quant.shard_reader import ChangedError, ShardReader
from quant.shards import Shards
from quant.store_file import StoreFile
from quant.tensor_rows import Scratch, published_rows, rows_span, scale_rows_span

SYNC_S = 2.0  # what a power cut may cost; longer, and reads wait for what is flushed at once
AHEAD = 64  # pieces handed out beside those in work, 256 MiB of FP8, which the system reads while the disk has time
HASH_BYTES = 1 << 25  # settled bytes that are worth a task
WAIT_S = 0.2  # for a shard, before progress is told again


class Encoder(Protocol):
    """What pieces become."""

    def columns(self, piece: Piece) -> torch.Tensor | None:
        """How much each column of a piece counts, if not alike: asked by one thread, in the order of pieces."""

    def encode(
        self, piece: Piece, rows: QuantTensor, columns: torch.Tensor | None, scratch: Scratch
    ) -> list[tuple[torch.Tensor, Errors | None]]:
        """Bytes of each target of a piece, uint8, and what was lost, where that is told: by many threads.

        Raises ValueError for weights that cannot be encoded.
        """


@dataclass
class _Shard:
    """A shard in work. left: pieces that are not written yet."""

    path: Path
    reader: ShardReader
    left: int


class ConversionRun:
    """Writes the pieces that are missing in `files`."""

    def __init__(
        self,
        source: Published,
        shards: Shards,
        files: Mapping[str, StoreFile],
        journal: Journal,
        encoder: Encoder,
        progress: Callable[[Progress], None],
    ) -> None:
        self.source, self.shards, self.files, self.journal, self.progress = source, shards, files, journal, progress
        self.encoder = encoder
        self._sizes = {shard.path: shard.file_bytes for shard in source.shards}
        self._scratch = Scratch()
        self._finished: SimpleQueue[tuple[Future[Any], Callable[[Any], None]]] = SimpleQueue()
        self._pieces = self._tasks = 0  # of which the end was not seen yet; pieces are tasks, too
        self._hashing: set[str] = set()
        self._dirty: set[str] = set()
        self._synced = time.monotonic()
        self._stopping = False
        self._now = Progress("", 0, 0)

    def run(self, pieces: Mapping[Path, list[Piece]]) -> None:
        """Convert; only then return. Raises Dsr1Error, and whatever `progress` raises."""
        with _workers() as (self._pool, count), ThreadPoolExecutor(1, "dsr1-keeper") as self._keeper:
            self._window = count + AHEAD
            try:
                self._run(self._missing(pieces))
            except BaseException as error:
                self._stop(error)
                raise

    def _run(self, missing: Mapping[Path, list[Piece]]) -> None:
        for name in self.files:
            self._follow(name)  # an earlier run may have written all of it
        self.shards.begin(list(missing))
        if not missing:
            self._tell(self._now)
        for path, todo in missing.items():
            shard = _Shard(path, self._open(path), len(todo))
            for piece in todo:
                while self._pieces >= self._window:
                    self._handle()
                self._hand_out(piece, shard)
        while self._tasks:
            self._handle()
        self._sync()
        while self._tasks:
            self._handle()

    def _missing(self, pieces: Mapping[Path, list[Piece]]) -> dict[Path, list[Piece]]:
        """By shard, what is to be done; what an earlier run has noted is compared with its checksum first."""
        list(self._pool.map(self._recover, self.files.values()))
        total = sum(source_bytes(of_shard, self.source) for of_shard in pieces.values())
        missing = {path: list(filter(None, map(self._rest, of_shard))) for path, of_shard in pieces.items()}
        left = sum(source_bytes(todo, self.source) for todo in missing.values())
        self._now = Progress("", total - left, total)
        return {path: todo for path, todo in missing.items() if todo}

    def _recover(self, file: StoreFile) -> None:
        for target in file.targets:
            noted = self.journal.pieces.get(target.key)
            if noted is not None and noted.crc32 == file.crc32(target):
                file.mark(target)

    def _rest(self, piece: Piece) -> Piece | None:
        """A piece with those targets that are missing."""
        files = self.files
        left = tuple(t for t in piece.targets if t.file in files and not files[t.file].is_done(t))
        return replace(piece, targets=left) if left else None

    def _open(self, path: Path) -> ShardReader:
        while (found := self.shards.fetch(path, WAIT_S)) is None:
            self._tell(replace(self._now, file=path.name, tensor=""))
            with suppress(Empty):
                while True:
                    self._take(*self._finished.get_nowait())
        return ShardReader(found, self._sizes[path])

    def _hand_out(self, piece: Piece, shard: _Shard) -> None:
        shard.reader.will_need(rows_span(self.source, piece))
        self._tell(replace(self._now, file=shard.path.name, tensor=piece.spec.source))
        columns = self.encoder.columns(piece)
        self._pieces += 1
        self._submit(
            self._pool, lambda: self._convert(piece, shard, columns), lambda done: self._note(piece, shard, done)
        )

    def _convert(self, piece: Piece, shard: _Shard, columns: torch.Tensor | None) -> list[Written]:
        """What a worker does with a piece, for each of its targets."""
        scales = self._scales(piece, shard)
        rows = published_rows(self.source, piece, shard.reader, scales, self._scratch)
        try:
            stored = self.encoder.encode(piece, rows, columns, self._scratch)
        except ValueError as error:
            raise CheckpointError(
                f"{self.source.folder}: tensor {piece.spec.source!r} cannot be quantised ({error}); download the model "
                "again"
            ) from None
        return [self._write(target, *of_target) for target, of_target in zip(piece.targets, stored, strict=True)]

    def _write(self, target: Target, stored: torch.Tensor, errors: Errors | None) -> Written:
        data = stored.numpy().data
        self.files[target.file].write(target.begin, data)
        return Written(zlib.crc32(data), errors.sums if errors is not None else ())

    def _scales(self, piece: Piece, shard: _Shard) -> bytes | None:
        span = scale_rows_span(self.source, piece)
        if span is None or span.path != shard.path:
            return None if span is None else self.shards.read(span, self._sizes[span.path])
        scales = bytearray(span.nbytes)
        shard.reader.read(span, memoryview(scales))
        return bytes(scales)

    def _note(self, piece: Piece, shard: _Shard, written: list[Written]) -> None:
        self._pieces -= 1
        for target, of_target in zip(piece.targets, written, strict=True):
            self.files[target.file].mark(target)
            self.journal.add_piece(target.key, of_target)
            self._dirty.add(target.file)
        for name in {target.file for target in piece.targets}:
            self._follow(name)
        self._tell(replace(self._now, done=self._now.done + source_bytes([piece], self.source)))
        shard.left -= 1
        if not shard.left:
            shard.reader.check_unchanged()
            shard.reader.close()
            self._sync(lambda _: self.shards.drop(shard.path))
        elif time.monotonic() > self._synced + SYNC_S:
            self._sync()

    def _follow(self, name: str) -> None:
        """Have settled bytes of a file read into its checksum, and the file finished when all are."""
        file = self.files[name]
        if name in self._hashing or self._stopping:
            return
        if file.is_whole and file.hashed == file.nbytes:
            self._hashing.add(name)  # for good
            self._sync()  # a whole file is not opened again, so the journal has all errors before it gets its name
            self._submit(self._keeper, file.finish, lambda record: self.journal.add_file(name, record))
        elif file.is_whole or file.settled - file.hashed >= HASH_BYTES:
            self._hashing.add(name)
            end = file.settled
            self._submit(self._pool, lambda: file.hash_on(end), lambda _: self._hashed(name))

    def _hashed(self, name: str) -> None:
        self._hashing.discard(name)
        self._follow(name)

    def _sync(self, then: Callable[[Any], None] = lambda _: None) -> None:
        """Have the journal say what is written, as soon as it is on the disk."""
        if self._stopping:
            return
        files, lines = [self.files[name] for name in sorted(self._dirty)], self.journal.take()
        self._dirty.clear()
        self._synced = time.monotonic()

        def keep() -> None:
            for file in files:
                file.sync()
            self.journal.write(lines)

        self._submit(self._keeper, keep, then)

    def _submit(self, pool: ThreadPoolExecutor, task: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run `task` there, and later `then` here with its result."""
        self._tasks += 1
        pool.submit(task).add_done_callback(lambda future: self._finished.put((future, then)))

    def _handle(self) -> None:
        self._take(*self._finished.get())

    def _take(self, future: Future[Any], then: Callable[[Any], None]) -> None:
        self._tasks -= 1
        then(future.result())

    def _tell(self, step: Progress) -> None:
        self._now = replace(step, fetching=self.shards.fetching())
        if not self._stopping:
            self.progress(self._now)

    def _stop(self, error: BaseException) -> None:
        """Begin nothing new, and write down what was finished; or, if a shard changed, that nothing of it can stay."""
        self._stopping = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._keeper.shutdown(wait=True)
        changed = isinstance(error, ChangedError)
        with suppress(Empty):
            while True:
                changed |= self._take_late(*self._finished.get_nowait())
        with suppress(Dsr1Error):  # the disk may be full
            if changed:
                self.journal.forget()
                return
            for name in self._dirty:
                self.files[name].sync()
            self.journal.write(self.journal.take())

    def _take_late(self, future: Future[Any], then: Callable[[Any], None]) -> bool:
        """Note what was done before the end; whether it is worthless, as a shard changed."""
        if future.cancelled() or future.exception() is not None:
            return isinstance(None if future.cancelled() else future.exception(), ChangedError)
        try:
            then(future.result())
        except ChangedError:
            return True
        return False


@contextmanager
def _workers() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads that run kernels and torch's operators each on its own core, and their number."""
    before, count = torch.get_num_threads(), thread_count()
    try:
        with ThreadPoolExecutor(count, "dsr1-convert", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, count
    finally:
        torch.set_num_threads(before)

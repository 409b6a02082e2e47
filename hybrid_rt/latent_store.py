"""Cached tokens on disk, so that what begins alike is not run through the model again: not even in another process.

The tokens of a conversation are cut into blocks of 64. A block's file is named by a hash of the model and of all
tokens up to the block's end, so whoever begins with the same tokens finds it: a resumed conversation, a fork of it, a
one-shot with the same system prompt. What is left behind the last whole block is a file, too, under the name of the
blocks before it with TAIL behind; there is one of these for each beginning, the latest.

Files are written under another name, put in place and never changed, so that processes need no lock. A file that is
damaged or of another model counts as missing. The least recently used go when the folder passes its limit.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hybrid_rt.latent_file import CachedTokens, engine_identity, read_latents, write_latents
from quant.errors import CheckpointError
from quant.files import PART_SUFFIX
from quant.user_cache import user_cache

if TYPE_CHECKING:
    from hybrid_rt.engine import Engine
    from hybrid_rt.session import Session

BLOCK = 64  # tokens: 4.3 MiB of DeepSeek-R1
SUFFIX, TAIL = ".latents", ".tail.latents"
DEFAULT_LIMIT = 8 << 30
SPARE_DISK = 1 << 30  # bytes that a cache leaves to others
ABANDONED_S = 3600  # a file that has been in writing for so long has lost its writer


@dataclass(frozen=True)
class Block:
    """A whole block of a sequence: where it begins and the name of its file. before: the name of the block before."""

    first: int
    before: str
    name: str


class LatentStore:
    """The files of one engine in a folder that all models share.

    limit: bytes that the folder may take; 0 keeps nothing. notes: sentences about files that could not be used, once
    each, for whoever shows them.
    """

    def __init__(self, engine: "Engine", limit: int = DEFAULT_LIMIT, folder: Path | None = None) -> None:
        self.folder = folder or user_cache() / "latents"
        self.limit = limit
        self.model = engine_identity(engine)
        self.notes: list[str] = []
        self._damaged: set[Path] = set()

    def restore(self, session: "Session", ids: Sequence[int]) -> int:
        """Give `session` the longest beginning of `ids` that it or the disk holds; returns its length."""
        known = session.keep_common(ids)
        position, before, used = 0, self.model, []
        blocks = list(self._blocks(ids))
        for number, block in enumerate(blocks):
            path = self._path(block.name)
            if block.first + BLOCK > known:
                found = self._read(path, session, ids[block.first : block.first + BLOCK])
                if found is None or len(found.tokens) < BLOCK:
                    self._forget_behind(path, blocks[number + 1 :])
                    break
                session.adopt(block.first, found)
            used.append(path)
            position, before = block.first + BLOCK, block.name
        tail = self._path(before, TAIL)
        found = self._read(tail, session, ids[position:])
        if found is not None and position + len(found.tokens) > len(session.tokens):
            session.adopt(position, found)
            used.append(tail)
        self._touch(used)
        return len(session.tokens)

    def keep(self, session: "Session", length: int | None = None, with_tail: bool = True) -> int:
        """Write what is missing of `session`'s first `length` tokens, by default all; returns the bytes written."""
        tokens = session.tokens[:length]
        blocks = list(self._blocks(tokens))
        end = BLOCK * len(blocks)
        wanted = [(self._path(block.name), block.first, block.first + BLOCK) for block in blocks]
        if with_tail and end < len(tokens):
            wanted.append((self._path(blocks[-1].name if blocks else self.model, TAIL), end, len(tokens)))
        written = 0
        try:
            for path, first, last in wanted:
                if path.name.endswith(TAIL) or not path.exists():
                    written += self._write(path, session, first, last)
            self._touch([path for path, _, _ in wanted])
            self._evict()
        except OSError as error:
            self._note(f"the cache of conversations cannot be written ({error.strerror}); they go on without it")
        return written

    def _write(self, path: Path, session: "Session", first: int, last: int) -> int:
        rows = session.cache.rows(first, last)
        nbytes = sum(tensor.nbytes for tensor in rows.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        if nbytes > self.limit or shutil.disk_usage(self.folder).free < SPARE_DISK + nbytes:
            return 0
        write_latents(path, self.model, session.tokens[first:last], rows)
        return nbytes

    def _read(self, path: Path, session: "Session", wanted: Sequence[int]) -> CachedTokens | None:
        """What a file holds of the tokens `wanted`, from their beginning on."""
        if not path.exists():
            return None
        try:
            found = read_latents(path, self.model, session.cache)
        except CheckpointError:
            self._note("a part of the cached conversation is damaged or foreign; it is computed again")
            path.unlink(missing_ok=True)
            self._damaged.add(path)
            return None
        shared = common_prefix(found.tokens, wanted)
        return CachedTokens(found.tokens[:shared], {name: rows[:, :shared] for name, rows in found.rows.items()})

    def _forget_behind(self, path: Path, blocks: Sequence[Block]) -> None:
        """Behind a damaged file there may be more of them, and all will be computed anyway."""
        if path in self._damaged:
            for block in blocks:
                self._path(block.name).unlink(missing_ok=True)

    def _blocks(self, tokens: Sequence[int]) -> Iterator[Block]:
        before = self.model
        for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
            content = np.asarray(tokens[first : first + BLOCK], np.int64).tobytes()
            name = hashlib.sha256(before.encode() + content).hexdigest()
            yield Block(first, before, name)
            before = name

    def _path(self, name: str, suffix: str = SUFFIX) -> Path:
        return self.folder / f"{name[:40]}{suffix}"

    def _touch(self, paths: Sequence[Path]) -> None:
        """Mark files as used just now; later blocks a little less, because they are of no use without earlier ones."""
        now = time.time_ns()
        for number, path in enumerate(paths):
            try:
                os.utime(path, ns=(now - number, now - 1000 * number))
            except OSError:  # evicted by another process
                continue

    def _evict(self) -> None:
        """Delete the least recently used files until the folder keeps to its limit."""
        files = sorted(self._files(), key=lambda file: file[0])
        total = sum(size for _, size, _ in files)
        for used, size, path in files:
            abandoned = path.name.endswith(PART_SUFFIX)
            if abandoned and time.time_ns() - used < ABANDONED_S * 10**9:
                continue
            if total <= self.limit and not abandoned:
                continue
            path.unlink(missing_ok=True)
            total -= size

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """When each file was used, its size and its path."""
        for entry in os.scandir(self.folder):
            if SUFFIX in entry.name:
                try:
                    status = entry.stat()
                except OSError:
                    continue
                yield status.st_mtime_ns, status.st_size, Path(entry.path)

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of leading tokens that two sequences share."""
    shared = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        shared += 1
    return shared

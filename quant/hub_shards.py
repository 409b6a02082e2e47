"""Shards that are downloaded one ahead of the one in work and deleted when they are converted.

So the disk holds the store, the shard in work, the next one and, for a moment, the one before, whatever the checkpoint.
Shards are converted one by one, not layer by layer, because a store's files take their pieces in any order. Only scales
may be wanted of a shard that is not there (a weight and its scales can lie in different ones): they are a 4096th of
the weights and are asked for as ranges of bytes.
"""

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from quant.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, shard_names
from quant.convert import Source, is_copied
from quant.errors import CheckpointError
from quant.hub_model import HubModel
from quant.journal import begun_task
from quant.progress import Fetching
from quant.safetensors_file import FileSpan
from quant.shards import Shards
from quant.store import CONFIG_NAME

FOLDER = "dsr1-source"  # inside of the store's folder, until the store is whole
PARTLY = ".cache/huggingface/download/*.incomplete"  # where huggingface_hub keeps what it downloads
AT_ONCE = 3  # shards on the disk: in work, next, and the one whose last bytes are being written down
HEADERS_AT_ONCE = 8


class HubShards(Shards):
    """keep: leave shards in the Hub's cache, where other programs find them, and delete none. root: of their paths."""

    def __init__(self, model: HubModel, root: Path, folder: Path, keep: bool) -> None:
        super().__init__()
        self.model, self.root, self.folder, self.keep = model, root, folder, keep
        self.task: Mapping[str, str] = {"hub": model.hub_id, "revision": model.revision}
        self._here: dict[Path, Path] = {}
        self._bringing = ""

    def disk_bytes(self, order: Sequence[Path]) -> int:
        missing = [name for name in map(self._name, order) if self.model.cached(name) is None]
        if self.keep:
            self._check_cache(sum(self.model.files[name].nbytes for name in missing))
            return 0
        largest = sorted(self.model.files[name].nbytes for name in missing)[-AT_ONCE:]
        return max(sum(largest) - sum(map(_blocks, self.folder.rglob("*.safetensors"))), 0)

    def begin(self, order: Sequence[Path]) -> None:
        wanted = {self.folder / self._name(path) for path in order}
        for path in (*self.folder.glob(PARTLY), *self.folder.rglob("*.safetensors")):
            if path not in wanted:  # a kill has left it
                path.unlink(missing_ok=True)
        super().begin(order)

    def bring(self, path: Path) -> Path:
        name = self._bringing = self._name(path)
        cached = self.model.cached(name)  # from there it is neither copied nor deleted
        self._here[path] = self.model.download(name, None if self.keep or cached else self.folder)
        self._bringing = ""
        return self._here[path]

    def read(self, span: FileSpan, nbytes: int) -> bytes:
        if (here := self._here.get(span.path)) is not None:
            with suppress(CheckpointError):  # it may be deleted in this moment
                return super().read(FileSpan(here, span.begin, span.nbytes), nbytes)
        return self.model.read(self._name(span.path), span.begin, span.nbytes)

    def drop(self, path: Path) -> None:
        here = self._here.pop(path)
        if here.is_relative_to(self.folder):
            here.unlink(missing_ok=True)

    def fetching(self) -> Fetching | None:
        name = self._bringing
        if not name:
            return None
        done = max(map(_blocks, self.folder.glob(PARTLY)), default=0)
        return Fetching(name, done, self.model.files[name].nbytes)

    def finish(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _check_cache(self, needed: int) -> None:
        """Raise CheckpointError unless the Hub's cache has room for shards that stay."""
        free = shutil.disk_usage(next(there for there in self.root.parents if there.exists())).free
        if needed > free:
            raise CheckpointError(
                f"--keep-source leaves {needed / 2**30:.1f} GiB in the Hub's cache, and its disk has "
                f"{free / 2**30:.1f} GiB free; free as much, set HF_HOME to another disk, or leave the option out"
            )


def _blocks(path: Path) -> int:
    """Bytes that a file takes on the disk; 0 if it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return 0
    return min(stat.st_size, getattr(stat, "st_blocks", stat.st_size) * 512)


def hub_source(hub_id: str, revision: str | None, store: Path, keep: bool) -> Source:
    """A model on the Hub, to be converted into the folder `store`: its texts and headers are read, no weights.

    revision: a branch, tag or commit; None for that of the conversion that was begun in `store`, or else the newest.
    Raises CheckpointError if it cannot be had, and as `Checkpoint.open`.
    """
    begun = begun_task(store)
    if revision is None and begun.get("hub") == hub_id:
        revision = begun.get("revision")
    model = HubModel.find(hub_id, revision)
    root = _texts(model)
    if keep:
        model.name_in_cache(revision, CONFIG_NAME)
    names = shard_names(root)
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        headers = dict(zip(names, pool.map(lambda name: model.header(name, root / name), names), strict=True))
    checkpoint = Checkpoint.open(root, lambda path: headers[path.relative_to(root).as_posix()])
    return Source(checkpoint, HubShards(model, root, store / FOLDER, keep), _fingerprint(model, names))


def _texts(model: HubModel) -> Path:
    """The folder in the Hub's cache to which all files were brought that a conversion needs beside the weights."""
    if not {INDEX_NAME, SINGLE_NAME} & model.files.keys():
        raise CheckpointError(f"{model.hub_id} has no safetensors files; give a model that is published in them")
    root = model.download(CONFIG_NAME, None).parent
    for name in model.files:
        if name == INDEX_NAME or is_copied(name):
            model.download(name, None)
    return root


def _fingerprint(model: HubModel, shards: Iterable[str]) -> str:
    """Over the texts and shards that are converted: names, sizes and what the Hub says of their content."""
    digest = hashlib.sha256()
    for name in sorted({*shards, *filter(is_copied, model.files)}):
        digest.update(f"{name} {model.files[name].nbytes} {model.files[name].sha256}\n".encode())
    return digest.hexdigest()

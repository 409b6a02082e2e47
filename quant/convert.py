"""From a published checkpoint to a store: shard by shard, in pieces of rows, with all cores.

Memory holds a few pieces a thread, never a layer. What is finished stays finished: after a kill, the same call
continues with the pieces that are missing, and the store is the same to the byte.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from quant.checkpoint import Checkpoint
from quant.conversion_run import ConversionRun, Encoder
from quant.encoding import Errors
from quant.errors import StoreError
from quant.files import PART_SUFFIX, new_file, sha256_of
from quant.formats import QuantTensor
from quant.importance import AllAlike, Importance
from quant.journal import Journal, check_target, conversion
from quant.manifest import MANIFEST_NAME, FileRecord, Manifest, formats_fingerprint
from quant.packed import PACKED_FORMATS
from quant.pieces import Piece, Published, Target, pieces_by_shard, store_pieces, targets_by_file
from quant.progress import Progress, ignore
from quant.recipes import DEFAULT_RECIPE, find_recipe
from quant.report import REPORT_NAME, Report, Stored, make_report
from quant.safetensors_file import FileSpan, SafetensorsFile
from quant.safetensors_writer import FilePlan
from quant.shard_reader import ShardReader
from quant.shards import Shards, known_sha256
from quant.store_file import PlannedFile, StoreFile
from quant.store_formats import StoreFormats
from quant.store_layout import STORE_VERSION, StoreEntry, placements, plan_store
from quant.tensor_rows import Scratch, stored_rows

TAIL_BYTES = 1 << 16  # of each shard, which tell models of one shape apart
ENCODER_SOURCES = (
    "packed.py",
    "packing.py",
    "encode_reference.py",
    "encoding.py",
    "pieces.py",
    "kernels/encode.py",
    "kernels/widen.py",
    "kernels/lanes.py",
    "kernels/vector.py",
)
# What else belongs to a model, copied as it is.
COPIED = (
    "config.json",
    "tokenizer*.json",
    "generation_config.json",
    "chat_template.*",
    "special_tokens_map.json",
    "LICENSE*",
)


@dataclass(frozen=True)
class Source:
    """A checkpoint, its shards, and what tells it from all others (in hexadecimal)."""

    checkpoint: Checkpoint
    shards: Shards
    fingerprint: str

    @staticmethod
    def of(checkpoint: Checkpoint) -> "Source":
        """One whose files are all in its folder."""
        return Source(checkpoint, Shards(), fingerprint(checkpoint))


def convert(
    source: Checkpoint | Source,
    folder: Path,
    recipe_name: str = DEFAULT_RECIPE,
    progress: Callable[[Progress], None] = ignore,
    importance: Importance | None = None,
) -> Manifest:
    """Write the store of `source` into `folder`, or finish one that was begun there. `progress` is called often.

    importance: of the columns of matrices, where they do not count alike.
    Raises StoreError if the folder cannot take it, and CheckpointError for shards that cannot be had or read, or hold a
    weight that is not a number.
    """
    source = source if isinstance(source, Source) else Source.of(source)
    checkpoint, importance = source.checkpoint, importance or AllAlike()
    formats = find_recipe(recipe_name).of(checkpoint.inventory.config, _embedding_format(checkpoint))
    plans = plan_store(checkpoint.inventory, formats)
    check_target(folder)
    shards = source.shards.disk_bytes([shard.path for shard in checkpoint.shards])
    check_space("the store", folder, plans.values(), shards)
    places = (place for name, plan in plans.items() for place in placements(name, plan))
    pieces = pieces_by_shard(checkpoint, places, store_pieces)
    with conversion(folder, _task(source, formats, importance)) as journal:
        files = {name: _copy(checkpoint.folder / name, folder / name) for name in copied_files(checkpoint.folder)}
        encoder = StoreEncoder(importance)
        files |= write_files(checkpoint, source.shards, folder, plans, pieces, journal, encoder, progress)
        report = _report(checkpoint, formats.recipe, plans, pieces, journal, importance)
        with new_file(folder / REPORT_NAME) as file:
            file.write(report.to_json())
        files[REPORT_NAME] = FileRecord(file.position, file.sha256)
        manifest = Manifest(formats, len(checkpoint.mtp_layers), files)
        with new_file(folder / MANIFEST_NAME) as file:
            file.write(manifest.to_json())
        source.shards.finish()
    return manifest


def copied_files(folder: Path) -> dict[str, int]:
    """Names and bytes of the files of a checkpoint that a store takes over."""
    found = {path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.stat().st_size for path in sorted(found)}


def is_copied(name: str) -> bool:
    """Whether a store takes over a checkpoint's file of that name."""
    return any(Path(name).match(pattern) for pattern in COPIED) and "/" not in name


def _embedding_format(source: Checkpoint) -> str:
    """Float32 only if the checkpoint holds an embedding, the model's or an MTP layer's, in float32."""
    names = ["embed", *(f"layers.{layer}.embed" for layer in source.mtp_layers)]
    return max(source.place(name)[0].name for name in names)  # "bf16" < "f32"


def _task(source: Source, formats: StoreFormats, importance: Importance) -> dict[str, str]:
    """What the journal says of a conversion."""
    return {
        "version": str(STORE_VERSION),
        "encoder": _encoder_fingerprint(),
        "recipe": f"{formats.recipe} {formats_fingerprint(formats)}",
        "source": source.fingerprint,
        "calibration": importance.identity,
        **source.shards.task,
    }


def _encoder_fingerprint() -> str:
    """Changes with the formats and with what chooses codes, so that no store is finished by another encoder."""
    digest = hashlib.sha256()
    for name in ENCODER_SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def fingerprint(source: Checkpoint) -> str:
    """SHA-256 over the copied files and, of each shard, name, size, header and last bytes, in hexadecimal.

    Where the Hub's checksum of a shard is known, it stands for header and last bytes.
    """
    digest = hashlib.sha256()
    for name in copied_files(source.folder):
        digest.update(f"{name} {sha256_of(source.folder / name)}\n".encode())
    for shard in source.shards:
        digest.update(f"{shard.path.name} {shard.file_bytes}\n".encode())
        known = known_sha256(shard.path)
        digest.update(known.encode() if known else _ends(shard))
    return digest.hexdigest()


def _ends(shard: SafetensorsFile) -> bytes:
    """The header of a file and its last bytes."""
    tail = max(shard.data_start, shard.file_bytes - TAIL_BYTES)
    with closing(ShardReader(shard.path, shard.file_bytes)) as reader:
        head, rest = bytearray(shard.data_start), bytearray(shard.file_bytes - tail)
        reader.read(FileSpan(shard.path, 0, len(head)), memoryview(head))
        reader.read(FileSpan(shard.path, tail, len(rest)), memoryview(rest))
    return bytes(head + rest)


class StoreEncoder:
    """A store's formats (`Encoder`)."""

    def __init__(self, importance: Importance) -> None:
        self.importance = importance

    def columns(self, piece: Piece) -> torch.Tensor | None:
        packed = any(target.representation in PACKED_FORMATS for target in piece.targets)
        return self.importance.of(piece.spec) if packed else None

    def encode(
        self, piece: Piece, rows: QuantTensor, columns: torch.Tensor | None, scratch: Scratch
    ) -> list[tuple[torch.Tensor, Errors | None]]:
        return [stored_rows(rows, target.representation, columns, scratch) for target in piece.targets]


Plans = Mapping[str, FilePlan[StoreEntry]]
Pieces = Mapping[Path, list[Piece]]  # by shard


def check_space(what: str, folder: Path, plans: Iterable[PlannedFile], shards: int) -> None:
    """Refuse before the first byte what would fill the disk. shards: bytes that they take there for a while."""
    there = folder if folder.exists() else next(parent for parent in folder.absolute().parents if parent.exists())
    needed, begun = sum(plan.nbytes for plan in plans), _bytes_on_disk(folder.glob(f"*{PART_SUFFIX}"))
    begun += _bytes_on_disk(folder.glob("*.safetensors"))
    free = shutil.disk_usage(there).free
    short = needed - begun + shards - free
    if short > 0:
        also = f", and shards of the checkpoint take {_size(shards)} for a while" if shards else ""
        has = f", of which {_size(begun)} are there" if begun else ""
        raise StoreError(
            f"{what} takes {_size(needed)}{has}{also}, and the disk of {there} has {_size(free)} free, "
            f"{_size(short)} too little; free as much and give the same command again, or give a place on another disk"
        )


def _bytes_on_disk(paths: Iterable[Path]) -> int:
    """What files take; in parts of a store that are not written yet there are holes."""
    stats = [path.stat() for path in paths]
    return sum(getattr(stat, "st_blocks", stat.st_size // 512) * 512 for stat in stats)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _copy(source: Path, path: Path) -> FileRecord:
    data = source.read_bytes()
    with new_file(path) as file:
        file.write(data)
    return FileRecord(len(data), file.sha256)


def write_files(
    source: Published,
    shards: Shards,
    folder: Path,
    plans: Mapping[str, PlannedFile],
    pieces: Pieces,
    journal: Journal,
    encoder: Encoder,
    progress: Callable[[Progress], None],
) -> dict[str, FileRecord]:
    """Write the files of `plans` that no earlier run has finished; records of all."""
    targets = targets_by_file(pieces)
    for name, plan in plans.items():
        record = _written(folder / name, plan, journal.files.get(name))
        if record is not None and _is_noted(targets[name], journal):
            journal.add_file(name, record)
        else:
            journal.files.pop(name, None)
            (folder / name).unlink(missing_ok=True)
    missing = {name: plan for name, plan in plans.items() if name not in journal.files}
    files = {name: StoreFile(folder / name, plan, targets[name]) for name, plan in missing.items()}
    try:
        ConversionRun(source, shards, files, journal, encoder, progress).run(pieces)
    finally:
        for file in files.values():
            file.close()
    for path in folder.glob(f"*{PART_SUFFIX}"):
        path.unlink()
    return {name: journal.files[name] for name in plans}


def _written(path: Path, plan: PlannedFile, known: FileRecord | None) -> FileRecord | None:
    """The record of a file that an earlier run has finished; `known` if the journal tells of it."""
    if not path.exists() or path.stat().st_size != plan.nbytes:
        return None
    with path.open("rb") as file:
        if file.read(len(plan.head)) != plan.head:
            return None
    return known or FileRecord(plan.nbytes, sha256_of(path))


def _is_noted(targets: Iterable[Target], journal: Journal) -> bool:
    """Whether the journal has the errors of all that is packed in a file: it has, unless somebody changed it."""
    packed = (target for target in targets if target.representation in PACKED_FORMATS)
    return all(target.key in journal.pieces and journal.pieces[target.key].errors for target in packed)


def _report(
    checkpoint: Checkpoint, recipe: str, plans: Plans, pieces: Pieces, journal: Journal, importance: Importance
) -> Report:
    """What was lost, from what the journal has of all pieces: the same, whoever wrote which piece and when."""
    errors: dict[Stored, Errors] = {}
    for plan in plans.values():
        for entry in plan.tensors:
            for spec, representation in entry.packed:
                errors[spec.name, representation] = Errors()
                importance.of(spec)  # an earlier run may have asked, and the summary is of all
    for piece in (piece for of_shard in pieces.values() for piece in of_shard):
        for target in piece.targets:
            if target.representation in PACKED_FORMATS:
                errors[piece.spec.name, target.representation].add(journal.pieces[target.key].errors)
    return make_report(checkpoint.inventory, recipe, errors, importance.summary())

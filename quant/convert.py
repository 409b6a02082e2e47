"""From a published checkpoint to a store: one file after the other, one strip of a matrix after the other.

Memory holds a few strips, never a layer. What is finished stays finished: after a kill, the same call continues with
the first file that is not there, and the store is the same to the byte.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from quant.checkpoint import Checkpoint
from quant.encoding import Errors, encode
from quant.errors import CheckpointError, StoreError
from quant.files import new_file, sha256_of
from quant.formats import FORMATS, FP8_BLOCK, FP8_BLOCK_SIDE, QuantTensor
from quant.importance import AllAlike, Importance
from quant.journal import check_target, conversion
from quant.manifest import MANIFEST_NAME, FileRecord, Manifest, formats_fingerprint
from quant.packed import PACKED_FORMATS, ExpertRecord
from quant.progress import Meter, Progress
from quant.recipes import DEFAULT_RECIPE, find_recipe
from quant.report import REPORT_NAME, Stored, make_report
from quant.safetensors_writer import FilePlan, write_safetensors
from quant.store_formats import StoreFormats
from quant.store_layout import STORE_VERSION, StoreEntry, plan_store

STRIP_WEIGHTS = 1 << 24  # 64 MiB in float32, and enough rows to keep many cores busy
TAIL_BYTES = 1 << 16  # of each shard, which tell models of one shape apart
ENCODER_SOURCES = ("packed.py", "packing.py", "encode_reference.py", "encoding.py", "kernels/encode.py")
MATRICES = 3  # of an expert: gate, up, down
# What else belongs to a model, copied as it is.
COPIED = (
    "config.json",
    "tokenizer*.json",
    "generation_config.json",
    "chat_template.*",
    "special_tokens_map.json",
    "LICENSE*",
)


def convert(
    source: Checkpoint,
    folder: Path,
    recipe_name: str = DEFAULT_RECIPE,
    progress: Callable[[Progress], None] = lambda _: None,
    importance: Importance | None = None,
) -> Manifest:
    """Write the store of `source` into `folder`, or finish one that was begun there. `progress` is called often.

    importance: of the columns of matrices, where they do not count alike.
    Raises StoreError if the folder cannot take it, and CheckpointError for a weight that is not a number.
    """
    formats = find_recipe(recipe_name).of(source.inventory.config, _embedding_format(source))
    plans = plan_store(source.inventory, formats)
    copies, search = copied_files(source.folder), Search(importance or AllAlike(), packed_tensors(plans))
    check_target(folder)
    _check_space(folder, plans)
    total = sum(plan.nbytes for plan in plans.values()) + sum(copies.values())
    meter = Meter(total, progress)
    with conversion(folder, _task(source, formats, copies, search.importance)):
        files = {name: _copy(source.folder / name, folder / name, meter) for name in copies}
        for name, plan in plans.items():
            files[name] = _write(source, folder / name, plan, search, meter)
        report = make_report(source.inventory, formats.recipe, search.errors, search.importance.summary())
        with new_file(folder / REPORT_NAME) as file:
            file.write(report.to_json())
        files[REPORT_NAME] = FileRecord(file.position, file.sha256)
        manifest = Manifest(formats, len(source.mtp_layers), files)
        with new_file(folder / MANIFEST_NAME) as file:
            file.write(manifest.to_json())
        for name in plans:
            _errors_path(folder / name).unlink(missing_ok=True)
    return manifest


@dataclass(frozen=True)
class Search:
    """importance: of the columns of matrices. errors: of every packed tensor in every format, as far as it is done."""

    importance: Importance
    errors: Mapping[Stored, Errors]


def packed_tensors(plans: Mapping[str, FilePlan[StoreEntry]]) -> dict[Stored, Errors]:
    """Empty errors for all that is packed, in the order of the store."""
    entries = [entry for plan in plans.values() for entry in plan.tensors]
    return {(spec.name, name): Errors() for entry in entries for spec, name in entry.packed}


def copied_files(folder: Path) -> dict[str, int]:
    """Names and bytes of the files of a checkpoint that a store takes over."""
    found = {path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.stat().st_size for path in sorted(found)}


def _embedding_format(source: Checkpoint) -> str:
    """Float32 only if the checkpoint holds an embedding, the model's or an MTP layer's, in float32."""
    names = ["embed", *(f"layers.{layer}.embed" for layer in source.mtp_layers)]
    return max(source.weight(name).format.name for name in names)  # "bf16" < "f32"


def _task(source: Checkpoint, formats: StoreFormats, copies: Iterable[str], importance: Importance) -> dict[str, str]:
    """What the journal says of a conversion."""
    return {
        "version": str(STORE_VERSION),
        "encoder": _encoder_fingerprint(),
        "recipe": f"{formats.recipe} {formats_fingerprint(formats)}",
        "source": fingerprint(source, copies),
        "calibration": importance.identity,
    }


def _encoder_fingerprint() -> str:
    """Changes with the formats and with what chooses codes, so that no store is finished by another encoder."""
    digest = hashlib.sha256()
    for name in ENCODER_SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def fingerprint(source: Checkpoint, copies: Iterable[str]) -> str:
    """SHA-256 over the copied files whole, and name, size, header and last bytes of each shard, in hexadecimal."""
    digest = hashlib.sha256()
    for name in copies:
        digest.update(f"{name} {sha256_of(source.folder / name)}\n".encode())
    for shard in source.shards:
        digest.update(f"{shard.path.name} {shard.file_bytes}\n".encode())
        with shard.path.open("rb") as file:
            digest.update(file.read(shard.data_start))
            file.seek(max(shard.data_start, shard.file_bytes - TAIL_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def _check_space(folder: Path, plans: dict[str, FilePlan[StoreEntry]]) -> None:
    """Refuse before the first byte what would fill the disk. Temporary files of an earlier run are written over."""
    there = folder if folder.exists() else next(parent for parent in folder.absolute().parents if parent.exists())
    begun = sum(path.stat().st_size for path in folder.glob("*.safetensors*"))
    short = sum(plan.nbytes for plan in plans.values()) - begun - shutil.disk_usage(there).free
    if short > 0:
        raise StoreError(
            f"the store needs {short / 2**30:.1f} GiB more than the disk of {there} has free; "
            "free as much, or give a folder on another disk"
        )


def _copy(source: Path, path: Path, meter: Meter) -> FileRecord:
    data = source.read_bytes()
    with new_file(path, meter.of(path.name)) as file:
        file.write(data)
    return FileRecord(len(data), file.sha256)


def _write(source: Checkpoint, path: Path, plan: FilePlan[StoreEntry], search: Search, meter: Meter) -> FileRecord:
    """Write a file of the store, unless an earlier run has finished it."""
    report = meter.of(path.name)
    if _is_written(path, plan) and _errors_read(path, search.errors):
        return FileRecord(plan.nbytes, sha256_of(path, report))
    sha256 = write_safetensors(path, plan, lambda entry: stored_values(source, entry, search), report)
    _write_errors(path, plan, search.errors)
    return FileRecord(plan.nbytes, sha256)


def _errors_path(path: Path) -> Path:
    """Where the errors of a file's tensors are until the report is made."""
    return path.with_suffix(".errors.json")


def _write_errors(path: Path, plan: FilePlan[StoreEntry], errors: Mapping[Stored, Errors]) -> None:
    keys = [(spec.name, name) for entry in plan.tensors for spec, name in entry.packed]
    with new_file(_errors_path(path)) as file:
        file.write(json.dumps([[*key, *errors[key].sums] for key in keys]).encode())


def _errors_read(path: Path, errors: Mapping[Stored, Errors]) -> bool:
    """Take in what an earlier run has written of a file's errors; False if that is not there."""
    try:
        for name, representation, *sums in json.loads(_errors_path(path).read_bytes()):
            errors[name, representation].add(sums)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _is_written(path: Path, plan: FilePlan[StoreEntry]) -> bool:
    if not path.exists() or path.stat().st_size != plan.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(plan.head)) == plan.head


def stored_values(source: Checkpoint, entry: StoreEntry, search: Search) -> Iterator[memoryview]:
    """The bytes of one entry of a store, in pieces."""
    if entry.record is None:
        [spec] = entry.specs
        yield from _tensor_values(source, spec.name, entry.representation, search)
        return
    for first in range(0, len(entry.specs), MATRICES):
        names = [spec.name for spec in entry.specs[first : first + MATRICES]]
        yield from _record_values(source, names, entry.record, search)


def _record_values(
    source: Checkpoint, names: Iterable[str], record: ExpertRecord, search: Search
) -> Iterator[memoryview]:
    """One expert: gate, up and down, filled up with zeros."""
    used = 0
    for name, fmt in zip(names, (record.format, record.format, record.down_format), strict=True):
        for piece in _tensor_values(source, name, fmt.name, search):
            used += len(piece)
            yield piece
    yield memoryview(bytes(record.nbytes - used))


def _tensor_values(source: Checkpoint, name: str, representation: str, search: Search) -> Iterator[memoryview]:
    if representation in PACKED_FORMATS:
        columns, errors = search.importance.of(source.inventory.by_name[name]), search.errors[name, representation]
    for strip in strips(source.weight(name)):
        if representation not in PACKED_FORMATS:
            yield _bytes_of(strip.dequantize(FORMATS[representation].dtype))
            continue
        try:
            yield _bytes_of(encode(strip.dequantize(torch.float32), PACKED_FORMATS[representation], columns, errors))
        except ValueError as error:
            published = source.inventory.by_name[name].source
            raise CheckpointError(
                f"{source.folder}: tensor {published!r} cannot be quantised ({error}); download the model again"
            ) from None


def strips(weight: QuantTensor) -> Iterator[QuantTensor]:
    """Whole rows of a plain or FP8 tensor, as views: multiples of 128, so that FP8 blocks and row tiles stay whole."""
    if len(weight.shape) == 1:
        yield weight
        return
    rows, columns = weight.shape
    step = max(STRIP_WEIGHTS // columns // FP8_BLOCK_SIDE, 1) * FP8_BLOCK_SIDE
    for start in range(0, rows, step):
        yield _rows(weight, start, min(start + step, rows))


def _rows(weight: QuantTensor, start: int, stop: int) -> QuantTensor:
    """Rows of a matrix; start: a multiple of 128."""
    scale = weight.scale
    if weight.format is FP8_BLOCK and scale is not None:
        scale = scale[start // FP8_BLOCK_SIDE : -(-stop // FP8_BLOCK_SIDE)]
    return QuantTensor(weight.format, (stop - start, weight.shape[1]), weight.data[start:stop], scale)


def _bytes_of(values: torch.Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().reshape(-1).data

"""What an export does, for its journal, and what it did, for whoever shows it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from quant.export.source import Source
from quant.journal import Task

VERSION = "1"
ENCODER_SOURCES = (
    "block_types.py",
    "block_reference.py",
    "block_kernels.py",
    "transfer.py",
    "targets.py",
    "encoder.py",
)


@dataclass(frozen=True)
class Exported:
    """files: names and bytes. encoded, taken: how many weights were encoded anew, and had their codes taken over."""

    files: dict[str, int]
    encoded: int
    taken: int


def task_of(source: Source, to: str, recipe: str) -> Task:
    """What the journal says of an export: only the same one continues."""
    digest = hashlib.sha256()
    for name in ENCODER_SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    told = {"version": VERSION, "to": to, "recipe": recipe, "source": source.fingerprint, "encoder": digest.hexdigest()}
    return told | dict(source.shards.task)

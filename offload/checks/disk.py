"""How fast the disk that holds a model gives its bytes, which bounds how fast it loads for the first time."""

import math
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from offload.checks.check import Check
from offload.sizes import format_size
from quant.files import let_go

BLOCK = 4 << 20  # bytes of a read
READERS = 8  # reads on their way at a time, as when experts are copied
LEAST_BYTES = 64 << 20  # less is read too soon to be measured
SECONDS = 1.0
SLOW_SECONDS = 600


def disk(folder: Path) -> Check:
    """Read the largest file of a model folder for a second, past the page cache."""
    sizes = {file: file.stat().st_size for file in model_files([folder])}
    total, largest = sum(sizes.values()), max(sizes, key=sizes.__getitem__, default=None)
    if largest is None or sizes[largest] < LEAST_BYTES:
        return Check("disk", f"{folder}: {format_size(total)} in files that are too small to measure it")
    speed = read_speed(largest)
    seconds = total / speed
    value = (
        f"{folder}: read at {speed / 1e9:.2f} GB/s; {format_size(total)} are loaded in {_duration(seconds)}, if not "
    )
    value += "in RAM from before"
    if seconds < SLOW_SECONDS:
        return Check("disk", value)
    return Check("disk", value, "attention", "keep the model on a faster disk, NVMe or several as one")


def any_disk(folders: Iterable[Path]) -> Check:
    """The same for the largest model file below `folders`."""
    files = model_files(folders)
    if not files:
        return Check("disk", "no model here to measure it with; name one, as in `dsr1 doctor --measure MODEL`")
    return disk(max(files, key=lambda file: file.stat().st_size).parent)


def model_files(folders: Iterable[Path]) -> list[Path]:
    """All safetensors files below `folders`; what cannot be read is left out."""
    return [file for folder in folders for file in folder.rglob("*.safetensors") if file.is_file()]


def read_speed(path: Path, seconds: float = SECONDS) -> float:
    """Bytes a second at which several threads read a file from its disk, for about `seconds`."""
    blocks, flags = max(1, path.stat().st_size // BLOCK), _flags(path)
    begin = time.perf_counter()

    def read(first: int) -> int:
        return sum(_read_blocks(path, flags, range(first, blocks, READERS), begin + seconds))

    with ThreadPoolExecutor(READERS) as pool:
        done = sum(pool.map(read, range(READERS)))
    return done / (time.perf_counter() - begin)


def _flags(path: Path) -> int:
    """How to open a file so that the page cache is not what is measured.

    Where the file system cannot pass it by, the file leaves it here, as far as nobody has it mapped.
    """
    direct = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    with suppress(OSError):
        next(_read_blocks(path, direct, [0], math.inf))
        return direct
    with path.open("rb") as file:
        let_go(file.fileno(), 0, path.stat().st_size)
    return os.O_RDONLY


def _read_blocks(path: Path, flags: int, blocks: Iterable[int], until: float) -> Iterator[int]:
    """Read blocks one after the other until time.perf_counter() is `until`; yields the bytes of each."""
    file = os.open(path, flags)
    try:
        with mmap.mmap(-1, BLOCK) as buffer:  # at the start of a page, as reads past the page cache need it
            for block in blocks:
                if time.perf_counter() > until:
                    return
                yield os.preadv(file, [buffer], block * BLOCK)
    finally:
        os.close(file)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

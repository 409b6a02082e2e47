"""What of a file Linux keeps in memory."""

import ctypes
import mmap
import os
import subprocess
from pathlib import Path

import pytest


def skip_in_ram(folder: Path) -> None:
    """Skip a test where files are in memory and nowhere else."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True).stdout
    if kind.strip() in ("tmpfs", "ramfs"):
        pytest.skip("files in RAM have no copy that could be dropped")


def write_to_disk(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def cached_pages(path: Path) -> int:
    """Pages of a file in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        count = -(-len(mapping) // mmap.PAGESIZE)
        found, address = (ctypes.c_ubyte * count)(), ctypes.c_char.from_buffer(mapping)
        place = ctypes.c_void_p(ctypes.addressof(address))
        assert ctypes.CDLL(None).mincore(place, ctypes.c_size_t(len(mapping)), found) == 0
        del address
    return sum(page & 1 for page in found)

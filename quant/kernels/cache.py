"""Machine code on disk, so that only the first process on a machine compiles.

    <user's cache>/dsr1/kernels/<fingerprint>/<kernel>.bin

A file holds a SHA-256 digest of the rest, which is what Numba made of a kernel, and which leaves it calls, pickled.

The fingerprint is that of all kernel sources, of Numba and of what LLVM compiles for. Each kernel has one signature and
so one file, which is put in place whole: processes that compile at once write the same. A file that is damaged counts
as none; where nothing can be written, what is there is read all the same.
"""

import contextlib
import hashlib
import os
import pickle
import platform
import secrets
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import llvmlite
import numba
from llvmlite import binding
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from quant import isa
from quant.user_cache import user_cache

SOURCES = Path(__file__).parent.parent  # quant/, of which kernels take code and constants from these files, too:
EXPORTED = ("export/block_kernels.py", "export/block_reference.py", "export/block_types.py")
MORE_SOURCES = ("formats.py", "packed.py", "encode_reference.py", "isa.py", *EXPORTED)
DIGEST_BYTES = hashlib.sha256().digest_size
KEPT_SECONDS = 30 * 24 * 3600  # for which the code of other versions stays after it was last used


class Loadable(Protocol):
    """A leaf (leaf.py)."""

    def load(self) -> None:
        """Have its machine code in this process."""


LEAVES: dict[str, Loadable] = {}  # by name; those that a kernel may call are there once its module is imported


class KernelCache(NullCache):
    """Numba's interface to a cache on disk, for one kernel. It stands as `_cache` in a dispatcher or a CFunc."""

    def __init__(self, name: str):
        self.name = name

    @property
    def cache_path(self) -> str:
        return str(cache_folder())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compile result on disk, with the leaves that it calls; None if there is none that can be used."""
        stored = read_result(self.name)
        if stored is None:
            return None
        leaves, reduced = stored
        for leaf in leaves:
            LEAVES[leaf].load()
        target_context.refresh()
        return CompileResult._rebuild(target_context, *reduced)

    def save_overload(self, sig: Any, cres: Any) -> None:
        """Keep a compile result, if it can be used by another process."""
        if not cres.library.has_dynamic_globals:
            leaves = [function.name for function in cres.library._final_module.functions if function.name in LEAVES]
            write_result(self.name, (leaves, cres._reduce()))


def result_file(name: str) -> Path:
    """Where the machine code of a kernel or a leaf is kept."""
    return cache_folder() / f"{name}.bin"


def read_result(name: str) -> Any:
    """What was kept under this name; None if nothing was, or it was damaged."""
    content = _read_checked(result_file(name))
    return None if content is None else pickle.loads(content)


def write_result(name: str, result: Any) -> None:
    """Keep something on disk, if there is room for it."""
    content = dumps(result)
    with contextlib.suppress(OSError):
        _write_whole(result_file(name), hashlib.sha256(content).digest() + content)


def _read_checked(file: Path) -> bytes | None:
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def _write_whole(file: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all. Leaves nothing behind when it fails."""
    _make_folder(file.parent)
    part = file.with_name(f".{secrets.token_hex(8)}.part")
    try:
        part.write_bytes(content)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make the folder of a fingerprint; the first time, remove those that no process has used for a month."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    oldest = time.time() - KEPT_SECONDS
    for other in folder.parent.iterdir():
        with contextlib.suppress(OSError):
            if other != folder and other.stat().st_mtime < oldest:
                shutil.rmtree(other)


@cache
def cache_folder() -> Path:
    """Where the code of these kernels for this processor is kept. It may not exist yet, and it may not be writable."""
    folder = user_cache() / "kernels" / _fingerprint()
    with contextlib.suppress(OSError):
        os.utime(folder)  # in use: not to be removed
    return folder


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("kernels/*.py"), *(SOURCES / name for name in MORE_SOURCES)]):
        digest.update(source.name.encode() + source.read_bytes())
    config: Any = numba.config
    processor = binding.get_host_cpu_name() if config.CPU_NAME is None else config.CPU_NAME
    features = binding.get_host_cpu_features().flatten() if config.CPU_FEATURES is None else config.CPU_FEATURES
    versions = f"{numba.__version__} {llvmlite.__version__} {sys.version}"
    digest.update(f"{versions} {platform.machine()} {processor} {features} {isa.current()}".encode())
    return digest.hexdigest()[:16]

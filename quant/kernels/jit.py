"""Compile kernels when they are first called, and keep the machine code on disk for the next process.

Numba's cache notices a change of a kernel's own file only, so the cache folder's name holds a hash of all kernel
sources, Numba's version and the processor. Each kernel has one signature: two processes that compile at once write
the same files, each put in place whole.
"""

import hashlib
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding
from numba.extending import register_jitable

from quant.user_cache import user_cache

# For functions that kernels call: they are compiled into their callers. `shared` ones run in plain Python too.
inner: Callable[[Callable[..., Any]], Any] = numba.njit(nogil=True, error_model="numpy")
shared: Callable[[Callable[..., Any]], Any] = register_jitable


KERNEL_SIGNATURE = "int64(int64, int64, int64, int64)"


class Compiled:
    """A function of int64 values, compiled for `signature` at its first call."""

    def __init__(self, function: Callable[..., Any], signature: str):
        self._function, self._signature = function, signature
        self._lock = threading.Lock()
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        compiled = self._compiled
        return compiled(*args) if compiled is not None else self.compile()(*args)

    def compile(self) -> Any:
        """The machine code, from the cache if it is there. (Dispatcher of Numba.)"""
        with self._lock:
            if self._compiled is None:
                dispatcher = numba.njit(nogil=True, error_model="numpy")(self._function)
                _with_cache(dispatcher.enable_caching)
                dispatcher.compile(self._signature)
                self._compiled = dispatcher
            return self._compiled


def compiled_once(signature: str) -> Callable[[Callable[..., Any]], Compiled]:
    """Decorator: Compiled."""
    return lambda function: Compiled(function, signature)


class Kernel:
    """A function (arguments, part, parts, sync) that threads run together (team.py), compiled when first needed."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._lock = threading.Lock()
        self._compiled: Any = None

    @property
    def address(self) -> int:
        """Of the machine code."""
        return int((self._compiled or self.compile()).address)

    def compile(self) -> Any:
        """The machine code, from the cache if it is there. (CFunc of Numba.)"""
        with self._lock:
            if self._compiled is None:
                make = partial(numba.cfunc, KERNEL_SIGNATURE, error_model="numpy")
                self._compiled = _with_cache(lambda: make(cache=True)(self._function)) or make()(self._function)
            return self._compiled


def _with_cache(work: Callable[[], Any]) -> Any:
    """work() with Numba's cache in our folder; None where nothing can be kept on disk."""
    folder = cache_folder()
    if folder is None:
        return None
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        return work()
    except (OSError, RuntimeError):
        return None  # nowhere to write: compiled in memory for this process
    finally:
        config.CACHE_DIR = before


@cache
def cache_folder() -> Path | None:
    """Where this machine's kernels are kept; None if nothing can be written there."""
    folder = user_cache() / "kernels" / _fingerprint()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def kernels_cached() -> bool:
    """Whether an earlier process left machine code on disk; if not, the first call of each kernel takes seconds."""
    folder = cache_folder()
    return folder is not None and any(folder.rglob("*.nbc"))


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    for name in ("formats.py", "packed.py", "encode_reference.py", "isa.py"):
        digest.update((Path(__file__).parent.parent / name).read_bytes())
    config: Any = numba.config
    asked, features = f"{config.CPU_NAME} {config.CPU_FEATURES}", binding.get_host_cpu_features().flatten()
    digest.update(f"{numba.__version__} {sys.version} {binding.get_host_cpu_name()} {features} {asked}".encode())
    return digest.hexdigest()[:16]

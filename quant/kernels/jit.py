"""Compile kernels when they are first needed; cache.py keeps the machine code for the next process."""

import threading
from collections.abc import Callable
from typing import Any

import numba
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.extending import register_jitable

from quant.kernels.cache import KernelCache, result_file

# For functions that kernels call: they are compiled into their callers. `shared` ones run in plain Python too; of
# `inner` ones there is no form that Python could call, which would take a fifth of the time to compile.
_INNER: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner: Callable[[Callable[..., Any]], Any] = numba.njit(**_INNER)
shared: Callable[[Callable[..., Any]], Any] = register_jitable

KERNEL_SIGNATURE = "int64(int64, int64, int64, int64)"
COMPILABLE: dict[str, "Compilable"] = {}  # by name; those of a module are there once it is imported


class Compilable:
    """A function to be compiled for one signature. name: unlike any other's, as it is that of a file on disk."""

    def __init__(self, function: Callable[..., Any], signature: str, name: str = ""):
        self.name = name or f"{function.__module__}.{function.__qualname__}"
        if self.name in COMPILABLE:
            raise ValueError(f"there are two kernels called {self.name}; one of them needs another name")
        COMPILABLE[self.name] = self
        self.function, self.signature = function, signature
        self._lock = threading.Lock()
        self._compiled: Any = None

    @property
    def compiled(self) -> bool:
        """Whether this process has the machine code."""
        return self._compiled is not None

    @property
    def ready(self) -> bool:
        """Whether `compile` takes no more than reading the machine code from disk."""
        return self.compiled or result_file(self.name).exists()

    def compile(self) -> Any:
        """What Numba makes of it, from the cache if it is there."""
        with self._lock:
            if self._compiled is None:
                self._compiled = self._make(KernelCache(self.name))
            return self._compiled

    def _make(self, cache: KernelCache) -> Any:
        raise NotImplementedError


class Compiled(Compilable):
    """A function of int64 values, compiled for `signature` at its first call."""

    def __call__(self, *args: Any) -> Any:
        compiled = self._compiled
        return compiled(*args) if compiled is not None else self.compile()(*args)

    def _make(self, cache: KernelCache) -> Any:
        dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(self.function)
        dispatcher._cache = cache
        dispatcher.compile(self.signature)
        return dispatcher


def compiled_once(signature: str) -> Callable[[Callable[..., Any]], Compiled]:
    """Decorator: Compiled."""
    return lambda function: Compiled(function, signature)


class Kernel(Compilable):
    """A function (arguments, part, parts, sync) that threads run together (team.py), compiled when first needed."""

    def __init__(self, function: Callable[..., Any], name: str = ""):
        super().__init__(function, KERNEL_SIGNATURE, name)

    @property
    def address(self) -> int:
        """Of the machine code."""
        return int((self._compiled or self.compile()).address)

    def _make(self, cache: KernelCache) -> Any:
        options = {"error_model": "numpy"}
        callback: Any = CFunc(self.function, normalize_signature(self.signature), locals={}, options=options)
        callback._cache = cache
        callback.compile()
        return callback

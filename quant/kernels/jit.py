"""Compile kernels when they are first called; cache.py keeps the machine code for the next process."""

import threading
from collections.abc import Callable
from typing import Any

import numba
import torch
from numba.extending import register_jitable

from quant.kernels.cache import KernelCache

# For functions that kernels call: they are compiled into their callers. `shared` ones run in plain Python too.
inner: Callable[[Callable[..., Any]], Any] = numba.njit(nogil=True, error_model="numpy")
shared: Callable[[Callable[..., Any]], Any] = register_jitable


KERNELS: dict[str, "Kernel"] = {}  # by name; a module's kernels are there once it is imported


class Kernel:
    """A function of addresses and numbers, compiled for `signature` at its first call.

    name: unlike any other kernel's, because the file of its machine code is called so; by default the function's.
    """

    def __init__(self, function: Callable[..., Any], signature: str, name: str = ""):
        self.name = name or f"{function.__module__}.{function.__qualname__}"
        if self.name in KERNELS:
            raise ValueError(f"there are two kernels called {self.name}; one of them needs another name")
        KERNELS[self.name] = self
        self.function, self._signature = function, signature
        self._lock = threading.Lock()
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        compiled = self._compiled
        return compiled(*args) if compiled is not None else self.compile()(*args)

    @property
    def ready(self) -> bool:
        """Whether `compile` takes no more than reading the code from disk."""
        return self._compiled is not None or KernelCache(self.name).file.exists()

    def compile(self) -> Callable[..., Any]:
        """The machine code, from the cache if it is there. (Dispatcher of Numba.)"""
        with self._lock:
            if self._compiled is None:
                self._compiled = self._load()
            return self._compiled

    def _load(self) -> Callable[..., Any]:
        dispatcher: Any = numba.njit(nogil=True, error_model="numpy", parallel=True)(self.function)
        dispatcher._cache = KernelCache(self.name)
        torch_threads = torch.get_num_threads()
        dispatcher.compile(self._signature)
        if torch.get_num_threads() != torch_threads:  # starting Numba's OpenMP threads sets torch's number too
            torch.set_num_threads(torch_threads)
        return dispatcher

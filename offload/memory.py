"""Memory for weights: huge pages, bound to a NUMA node, filled from a file, or kept in RAM.

Linux places a page where the thread runs that touches it first. So memory of a node is filled by threads on that node's
processors; `bind` besides holds it there when the node is full. A binding of mapped files does nothing: their pages
lie in the page cache, wherever they were read first. That is why weights are copied where there are several nodes.
"""

import ctypes
import mmap
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from offload.hardware import lockable
from offload.sizes import format_size
from quant.errors import DeviceError, StoreError
from quant.files import let_go

HUGE_PAGE = 2 << 20
READ_BYTES = 16 << 20  # read at a time; so much of a file is in memory twice, for each thread
MOST_THREADS = 16  # that read files for one node
SYS_MBIND = {"x86_64": 237, "aarch64": 235}  # Linux's numbers of the system call
MPOL_BIND = 2
MASK_BITS = 1024  # nodes that the mask of mbind has room for


def huge_memory(nbytes: int) -> Tensor:
    """uint8 [nbytes] of fresh memory, zeros, from the start of a huge page on; freed with the last view of it.

    It is in huge pages where the system grants them, and takes RAM when it is first touched.
    """
    # private: huge pages of shared memory have a setting of their own, which is off nearly everywhere
    mapping = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE_PAGE
    return whole[first : first + nbytes]


def bind(memory: Tensor, node: int) -> bool:
    """Let pages of `memory` that are touched from now on come from `node` alone. Returns False if Linux refuses.

    Containers often refuse; then the memory still lies where the first thread to touch it runs, if there is room.
    """
    number = SYS_MBIND.get(platform.machine())
    if not hasattr(os, "sched_setaffinity") or number is None or node >= MASK_BITS:
        return False
    mask = (ctypes.c_uint64 * (MASK_BITS // 64))()
    mask[node // 64] = 1 << node % 64
    begin, nbytes = _pages(memory)
    arguments = (begin, nbytes, MPOL_BIND, ctypes.addressof(mask), MASK_BITS + 1, 0)
    return ctypes.CDLL(None).syscall(number, *map(ctypes.c_ulong, arguments)) == 0


def lock(memory: Tensor) -> None:
    """Read mapped `memory` into RAM and keep it there until it is unmapped; it cannot be written from then on.

    Raises DeviceError where the system does not allow that.
    """
    libc, (begin, nbytes) = ctypes.CDLL(None, use_errno=True), _pages(memory)
    place = ctypes.c_void_p(begin), ctypes.c_size_t(nbytes)
    # Linux locks a private copy of each page that could be written: the file would be in RAM twice
    if libc.mprotect(*place, mmap.PROT_READ) or libc.mlock(*place):
        raise cannot_lock(memory.nbytes, os.strerror(ctypes.get_errno()))


def check_lockable(nbytes: int) -> None:
    """Raise DeviceError unless this process may lock so many bytes."""
    limit = lockable()
    if limit is not None and limit < nbytes:
        raise cannot_lock(nbytes, f"its limit is {format_size(limit)}")


def cannot_lock(nbytes: int, reason: str) -> DeviceError:
    """The error of memory that cannot be locked."""
    return DeviceError(
        f"{format_size(nbytes)} of routed experts cannot be locked in RAM by this process ({reason}); raise the limit "
        "(`ulimit -l unlimited`, memlock in /etc/security/limits.conf, `docker run --ulimit memlock=-1`), or take "
        "--residency mapped or copied"
    )


def _pages(memory: Tensor) -> tuple[int, int]:
    """Address and bytes of the pages that `memory` lies in."""
    begin = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    return begin, memory.data_ptr() + memory.nbytes - begin


class OnceRead:
    """A file that is read once: what was read leaves the page cache, so that its copy does not take RAM twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self, begin: int, target: Tensor) -> None:
        """Fill `target`, uint8 and contiguous, from byte `begin` on. Raises StoreError if the file ends before."""
        left = memoryview(target.numpy().data)
        while left:
            done = os.preadv(self._file, [left[:READ_BYTES]], begin)
            if not done:
                raise StoreError(f"{self.path} became shorter while it was read; start again")
            self.forget(begin, done)
            left, begin = left[done:], begin + done

    def forget(self, begin: int, nbytes: int) -> None:
        """Let Linux drop these bytes from the page cache; it keeps pages that other programs have mapped."""
        let_go(self._file, begin, nbytes)


def run_near(work: Iterable[tuple[Sequence[int], Iterable[Callable[[], None]]]]) -> None:
    """Run jobs on threads that stay on the processors beside them, and return when all are done.

    Raises the first error; jobs that were not begun by then are left out.
    """
    pools: list[ThreadPoolExecutor] = []
    futures: list[Future[None]] = []
    try:
        for cpus, jobs in work:
            pools.append(ThreadPoolExecutor(min(len(cpus), MOST_THREADS), initializer=_stay_on, initargs=(cpus,)))
            futures += [pools[-1].submit(job) for job in jobs]
        for future in futures:
            future.result()
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _stay_on(cpus: Sequence[int]) -> None:
    """Keep the calling thread, and no other, on `cpus`."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)

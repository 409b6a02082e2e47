"""What this machine has, and what that means for dsr1. Only measuring imports torch and Numba."""

import os
import platform
from pathlib import Path

import psutil

from offload.checks.bandwidth import bandwidth
from offload.checks.check import Check
from offload.checks.disk import any_disk, disk
from offload.checks.folders import hub_cache, hub_cache_folder, kernel_cache
from offload.checks.gpu import gpu
from offload.checks.memory import huge_pages, locked_memory, numa, overcommit, ram, swap
from offload.checks.models import models
from offload.checks.processor import amx, cores, instruction_sets, processor
from offload.checks.software import operating_system, packages, python
from offload.checks.speeds import kept_speeds, speeds
from offload.hardware import allowed_cores, cpu_quota, gpus, lockable, memory_limit, usable_ram
from offload.topology import read_topology
from quant import isa
from quant.user_cache import user_cache

ROOT = Path("/")


def examine(root: Path = ROOT, measure: bool = False, model: Path | None = None) -> list[Check]:
    """All checks; what this platform does not tell is left out.

    root: where /proc, /sys and /etc are. measure: whether to measure how fast RAM and the disk are read, which takes
    some seconds. model: the folder whose disk that is, by default that of the largest model in the cache folders.
    """
    checks = [*_software(root), *_processor(root), *_memory(root), gpu(gpus()), *_folders()]
    if measure:
        checks.append(any_disk([user_cache(), hub_cache_folder()]) if model is None else disk(model))
        checks += [bandwidth(usable_ram()), speeds()]
    else:
        checks.append(kept_speeds())
    return [check for check in checks if check is not None]


def _software(root: Path) -> list[Check]:
    return [operating_system(root, platform.system()), python(), packages()]


def _processor(root: Path) -> list[Check | None]:
    quota = cpu_quota(root / "sys/fs/cgroup", root / "proc")
    return [
        processor(root),
        cores(allowed_cores(), os.cpu_count() or 1, quota),
        _instruction_sets(),
        amx(root),
        numa(read_topology(root)),
    ]


def _instruction_sets() -> Check | None:
    try:
        names = isa.available()
    except (ImportError, OSError):  # llvmlite is missing or broken, of which the check of the packages tells
        return None
    return instruction_sets(names, os.environ.get("NUMBA_CPU_NAME"))


def _memory(root: Path) -> list[Check | None]:
    memory, usable = psutil.virtual_memory(), usable_ram()
    limit = memory_limit(root / "sys/fs/cgroup", root / "proc")
    return [
        ram(memory.total, memory.available, limit, usable),
        models(usable),
        locked_memory(lockable()),
        huge_pages(root),
        overcommit(root),
        swap(root),
    ]


def _folders() -> list[Check]:
    return [kernel_cache(user_cache() / "kernels"), hub_cache(hub_cache_folder())]

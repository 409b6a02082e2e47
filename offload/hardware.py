"""What this machine has: RAM and GPU memory, asked for without importing torch."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from offload.plan import Device
from offload.sizes import format_size
from quant.errors import DeviceError

DEVICES = ("auto", "cuda", "cpu", "emulate")
RAM_RESERVE = 2 * 2**30  # bytes left to the system, to Python and to torch,
RAM_RESERVE_SHARE = 0.02  # and this part of the whole
CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")
# The files of a control group that tell its limit, of version 2 and of version 1.
MEMORY_FILES = (("memory.max", "anon"), ("memory.limit_in_bytes", "total_rss"))  # and what memory.stat calls anonymous
CPU_FILES = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
UNLIMITED = 2**62  # version 1 writes a number above this one where there is no limit
NVIDIA_SECONDS = 10
CAP_IPC_LOCK = 14  # Linux's number of the right to lock memory without a limit


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of one GPU."""

    free: int
    total: int


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi tells of one GPU."""

    name: str
    driver: str
    memory: GpuMemory


def allowed_cpus() -> list[int]:
    """Numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def allowed_cores() -> int:
    """Processors that this process may run on."""
    return len(allowed_cpus())


def lockable(proc: Path = PROC) -> int | None:
    """Bytes that this process may keep from being paged out; None without a limit."""
    try:
        import resource
    except ImportError:  # off Unix
        return 0
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY or _has_capability(CAP_IPC_LOCK, proc) else limit


def _has_capability(bit: int, proc: Path) -> bool:
    try:
        held = re.search(r"^CapEff:\s+([0-9a-f]+)$", (proc / "self" / "status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return held is not None and bool(int(held[1], 16) >> bit & 1)


def usable_ram() -> int:
    """Bytes that dsr1 may use by default: what is available less a reserve, at most half of it.

    Pages of mapped files are available.
    """
    memory = psutil.virtual_memory()
    left = [max(0, limit - used) for limit, used in _memory_limits(CGROUP, PROC)]
    available = min([memory.available, *left])
    reserve = RAM_RESERVE + RAM_RESERVE_SHARE * memory.total
    return int(available - min(reserve, available / 2))  # a small model runs on a small machine, too


def memory_limit(cgroup: Path = CGROUP, proc: Path = PROC) -> int | None:
    """Bytes that the container, or another control group, allows; None without a limit."""
    return min((limit for limit, _ in _memory_limits(cgroup, proc)), default=None)


def cpu_quota(cgroup: Path = CGROUP, proc: Path = PROC) -> float | None:
    """Cores' worth of time that the container, or another control group, allows; None without a limit."""
    quotas = [_cpu_quota(group) for group in _control_groups("cpu", cgroup, proc)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _control_groups(controller: str, cgroup: Path, proc: Path) -> list[Path]:
    """Folders of the control groups that this process is in, and of those above; not all of them need exist.

    Version 2 is mounted at `cgroup`, the controllers of version 1 in folders there. In a container the mount itself is
    often the process's group, whatever /proc says.
    """
    folders = [cgroup, cgroup / controller]
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return folders
    for line in lines:  # "0::/path" is of version 2, "4:cpu,cpuacct:/path" of version 1
        controllers, _, path = line.partition(":")[2].partition(":")
        parts = Path(path).parts[1:]
        if ".." in parts or controllers and controller not in controllers.split(","):
            continue
        mount = cgroup / controller if controllers else cgroup
        folders += [mount.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]
    return folders


def _memory_limits(cgroup: Path, proc: Path) -> list[tuple[int, int]]:
    """Limit and bytes in use, page cache not counted, of each control group that has a limit."""
    limits = [_memory_limit(group) for group in _control_groups("memory", cgroup, proc)]
    return [limit for limit in limits if limit is not None]


def _memory_limit(group: Path) -> tuple[int, int] | None:
    for name, anonymous in MEMORY_FILES:
        try:
            limit = int((group / name).read_text())
            fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return None if limit > UNLIMITED else (limit, int(fields[anonymous]))
        except (OSError, ValueError, KeyError):  # "max" among them
            continue
    return None


def _cpu_quota(group: Path) -> float | None:
    for names in CPU_FILES:
        try:
            quota, period = (int(word) for name in names for word in (group / name).read_text().split())
        except (OSError, ValueError):  # "max" among them
            continue
        return quota / period if quota > 0 else None
    return None


def choose_device(asked: str, gpu_mem: int | None, notes: list[str]) -> tuple[Device, int]:
    """The device to plan for and the bytes of GPU memory to use there; 0 without a GPU.

    "auto" takes a GPU if there is one, or if memory for one is given. Raises DeviceError for what cannot be planned.
    """
    if asked not in DEVICES:
        raise DeviceError(f"there is no device {asked!r}; give one of {', '.join(DEVICES)}")
    if asked == "cpu":
        if gpu_mem is not None:
            notes.append("--gpu-mem is without effect on the device cpu")
        return "cpu", 0
    device: Device = "emulate" if asked == "emulate" else "cuda"
    gpu = gpu_memory() if device == "cuda" else None
    if gpu_mem is not None:
        if gpu is not None and gpu.free < gpu_mem:
            notes.append(f"the GPU of this machine has {format_size(gpu.free)} free, less than --gpu-mem")
        return device, gpu_mem
    if gpu is not None:
        return device, gpu.free
    if asked == "auto":
        return "cpu", 0
    raise DeviceError(f"how much memory the device {asked} has is not known here; say it with --gpu-mem, as in 24G")


def gpu_memory() -> GpuMemory | None:
    """The memory of the first GPU that CUDA may use; None without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    if first in ("", "-1"):
        return None
    try:
        [row, *_] = _nvidia_smi("memory.free,memory.total", "-i", first)
        free, total = (int(mib) * 2**20 for mib in row)
    except ValueError:
        return None
    return GpuMemory(free, total)


def gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi tells of, with their memory; none without it."""
    found = []
    for row in _nvidia_smi("memory.free,memory.total,driver_version,name"):
        try:
            free, total, driver, name = row
            found.append(Gpu(name, driver, GpuMemory(int(free) * 2**20, int(total) * 2**20)))
        except ValueError:  # "[N/A]" among them
            continue
    return found


def _nvidia_smi(fields: str, *more: str) -> list[list[str]]:
    """The values of `fields` for each GPU; sizes are MiB. Empty if nvidia-smi is missing or fails."""
    command = ("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", *more)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines()]

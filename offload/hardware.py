"""What this machine has: RAM and GPU memory, asked for without importing torch."""

import os
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
QUERY = ("nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits")
QUERY_SECONDS = 10


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of one GPU."""

    free: int
    total: int


def usable_ram() -> int:
    """Bytes that dsr1 may use by default: what is available less a reserve. Pages of mapped files are available."""
    memory = psutil.virtual_memory()
    available = min(memory.available, _left_in_container(CGROUP))
    return max(0, int(available - RAM_RESERVE - RAM_RESERVE_SHARE * memory.total))


def _left_in_container(cgroup: Path) -> float:
    """Bytes that a memory limit of the container leaves, page cache not counted; infinite without a limit."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        fields = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, limit - int(fields["anon"]))
    except (OSError, ValueError, KeyError):  # "max" among them
        return float("inf")


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
        done = subprocess.run([*QUERY, "-i", first], capture_output=True, text=True, timeout=QUERY_SECONDS, check=True)
        free, total = (int(mib) * 2**20 for mib in done.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return GpuMemory(free, total)

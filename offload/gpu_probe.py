"""The first GPU of this machine, measured through torch: its memory, and the way there and back.

This has not run on a GPU yet.
"""

from collections.abc import Callable
from statistics import median

import torch

from offload.machine import MachineGpu

COPIED = 2**28  # bytes
RUNS = 5
TYPICAL_FLOPS = 100e12  # where no data sheet is known


def measure_gpu(sheet: MachineGpu | None) -> MachineGpu | None:
    """The GPU that torch sees, with the arithmetic of its data sheet; the sheet itself where torch sees none."""
    if not torch.cuda.is_available():
        return sheet
    major, minor = torch.cuda.get_device_capability()
    _, total = torch.cuda.mem_get_info()
    device, host = torch.empty(COPIED, dtype=torch.uint8, device="cuda"), torch.empty(COPIED, dtype=torch.uint8)
    host, other = host.pin_memory(), torch.empty_like(device)
    return MachineGpu(
        name=torch.cuda.get_device_name(),
        memory=total,
        read_bytes_s=2 * _rate(lambda: other.copy_(device)),  # a copy reads and writes
        flops=TYPICAL_FLOPS if sheet is None else sheet.flops,
        to_gpu_bytes_s=_rate(lambda: device.copy_(host, non_blocking=True)),
        to_host_bytes_s=_rate(lambda: host.copy_(device, non_blocking=True)),
        capability=f"{major}.{minor}",
    )


def _rate(copy: Callable[[], object]) -> float:
    """Bytes a second of a copy of COPIED bytes."""
    times = []
    for _ in range(1 + RUNS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        copy()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return COPIED / median(times[1:])

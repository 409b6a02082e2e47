"""GPUs, as nvidia-smi tells of them."""

from collections.abc import Sequence

from offload.checks.check import Check
from offload.hardware import Gpu
from offload.sizes import format_size


def gpu(found: Sequence[Gpu]) -> Check:
    if not found:
        return Check("GPU", "none that nvidia-smi tells of")
    told = [
        f"{one.name}, {format_size(one.memory.free)} of {format_size(one.memory.total)} free, driver {one.driver}"
        for one in found
    ]
    return Check("GPU", f"{'; '.join(told)}; not used by this version")

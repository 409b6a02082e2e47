"""The figures that plans' predictions stand on: measured now, or kept from before, with their date."""

from offload.checks.check import Check
from offload.machine import Machine, block_ns
from offload.this_machine import keep, measured_machine
from quant.errors import StoreError


def kept_speeds() -> Check:
    """What was measured before, if anything was."""
    machine = measured_machine()
    if machine is None:
        return Check("speeds", "not measured; `dsr1 doctor --measure` measures what `dsr1 plan` predicts with")
    return Check("speeds", _told(machine))


def speeds() -> Check:
    """Measure kernels, memory, and the GPU if torch sees one; keep that for `dsr1 plan`."""
    from offload.hardware import allowed_cores
    from offload.probe import probe
    from quant.kernels.threads import set_threads

    set_threads(allowed_cores())
    machine = probe(lambda _: None)
    try:
        keep(machine)
    except (StoreError, OSError):
        remedy = "plans are predicted with assumed speeds; set XDG_CACHE_HOME to a folder that is writable"
        return Check("speeds", f"{_told(machine)}; could not be kept", "attention", remedy)
    return Check("speeds", _told(machine))


def _told(machine: Machine) -> str:
    blocks = ", ".join(
        f"{name} {block_ns(points, 1):.0f}/{block_ns(points, 64):.0f}" for name, points in machine.experts.items()
    )
    told = f"of {machine.date}: memory {machine.read_bytes_s / 1e9:.1f} GB/s"
    told += f"; ns of a core for a block of weights, with 1 and 64 tokens: {blocks}"
    gpu = machine.gpu
    if gpu is None or not gpu.capability:
        return told
    ways = f"{gpu.to_gpu_bytes_s / 1e9:.0f} there and {gpu.to_host_bytes_s / 1e9:.0f} GB/s back"
    return f"{told}; {gpu.name} (sm {gpu.capability}): {gpu.read_bytes_s / 1e9:,.0f} GB/s, PCIe {ways}"

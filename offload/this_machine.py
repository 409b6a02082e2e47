"""Which machine a plan is predicted for: one that is named, this one as it was measured, or one like it.

What was measured is kept in the cache folder under a name made of the host, its processor and its cores, with its date;
it is never measured anew unless somebody asks for that (`dsr1 doctor --measure`, `dsr1 bench`).
"""

import hashlib
import platform
import re
from dataclasses import replace
from pathlib import Path

import psutil

from offload.hardware import allowed_cores, gpus
from offload.machine import Machine, MachineGpu, load_machine, named_machines, read_machine
from quant.errors import Dsr1Error
from quant.files import new_file
from quant.user_cache import user_cache

TYPICAL = "rtx-4090-ddr5"  # what is assumed of a machine that was not measured
MODEL_NAME = re.compile(r"^model name\s*:\s*(.*)$", re.MULTILINE)


def machine_for(hardware: str | None) -> Machine:
    """The machine that is named or described by a file, or else this one; always with a GPU to plan for.

    Raises Dsr1Error for a name or file that is none.
    """
    machine = load_machine(hardware) if hardware is not None else measured_machine() or assumed_machine()
    return machine if machine.gpu is not None else replace(machine, gpu=known_gpu())


def measured_machine() -> Machine | None:
    """This machine as it was measured, if it was."""
    path = cache_file()
    try:
        return read_machine(path) if path.is_file() else None
    except Dsr1Error:  # of another version, or damaged: as if it were not there
        return None


def keep(machine: Machine) -> Path:
    """Write what was measured of this machine; returns where. Raises StoreError when the disk refuses."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(machine.to_json().encode())
    return path


def assumed_machine() -> Machine:
    """A machine with this one's cores and RAM, and the speeds of a shipped one."""
    typical = load_machine(TYPICAL)
    return replace(
        typical,
        name="this machine",
        source=f"not measured: speeds are those of {TYPICAL}; `dsr1 doctor --measure` measures them",
        cores=allowed_cores(),
        ram=psutil.virtual_memory().total,
        gpu=known_gpu(),
    )


def known_gpu() -> MachineGpu | None:
    """The first GPU that nvidia-smi tells of, with the data sheet of a shipped machine's; without one TYPICAL's."""
    sheets = [machine.gpu for name in named_machines() if (machine := load_machine(name)).gpu is not None]
    typical = load_machine(TYPICAL).gpu
    for found in gpus():
        names = (sheet for sheet in sheets if sheet is not None and sheet.name.split()[-1] in found.name)
        sheet = next(names, typical)
        return None if sheet is None else replace(sheet, name=found.name, memory=found.memory.total)
    return typical


def cache_file(root: Path = Path("/")) -> Path:
    """Where this machine's figures are kept."""
    try:
        found = MODEL_NAME.search((root / "proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        found = None
    processor = found[1] if found else platform.processor()
    key = hashlib.sha256(f"{platform.node()} {processor} {allowed_cores()}".encode()).hexdigest()[:16]
    return user_cache() / "machines" / f"{key}.json"

"""The operating system, Python and the packages that dsr1 stands on."""

import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from offload.checks.check import Check, read_text

PACKAGES = ("dsr1", "torch", "numba", "llvmlite", "numpy")


def operating_system(root: Path, system: str) -> Check:
    """system: as platform.system() names it."""
    if system != "Linux":
        return Check("system", platform.platform(), "attention", "dsr1 is tested on Linux only; there it is at home")
    name = re.search(r'^PRETTY_NAME="?([^"\n]*)', read_text(root / "etc/os-release"), re.MULTILINE)
    kernel = read_text(root / "proc/sys/kernel/osrelease")
    value = ", ".join([*([name[1]] if name else []), f"Linux {kernel}".strip()])
    if "microsoft" not in kernel.lower():
        return Check("system", value)
    remedy = "Windows gives Linux half of the RAM; set memory= in .wslconfig, and keep models on Linux's own disk"
    return Check("system", value, "attention", remedy)


def python() -> Check:
    value = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.maxsize > 2**32:
        return Check("Python", value)
    return Check("Python", f"{value}, 32 bits", "problem", "install a Python of 64 bits; models are larger than 4 GiB")


def packages(names: Sequence[str] = PACKAGES) -> Check:
    """Versions of the packages, which are not imported for that."""
    versions = {name: _version(name) for name in names}
    value = ", ".join(f"{name} {found or 'missing'}" for name, found in versions.items())
    if all(versions.values()):
        return Check("packages", value)
    return Check("packages", value, "problem", "install dsr1 again with pip, which brings what it needs")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

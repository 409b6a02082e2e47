"""What both drivers read from a command line and print: names, tables, JSON, and what machine it was."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from offload.hardware import allowed_cores
from offload.sizes import format_size
from quant.errors import Dsr1Error

CPUINFO = Path("/proc/cpuinfo")
# What decides which kernels run, ours and the peers'.
TOLD_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")


def machine(cpuinfo: Path = CPUINFO) -> dict[str, Any]:
    """Processor, cores, memory and system."""
    fields = _cpu_fields(cpuinfo)
    flags = set(fields.get("flags", "").split())
    return {
        "processor": fields.get("model name", platform.processor() or "unknown"),
        "cores": allowed_cores(),
        "flags": [flag for flag in TOLD_FLAGS if flag in flags],
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def machine_line(fields: dict[str, Any]) -> str:
    """The machine in a sentence for people."""
    return (
        f"{fields['processor']}, {fields['cores']} cores ({' '.join(fields['flags'])}), "
        f"{format_size(fields['ram_bytes'])} RAM, {fields['system']}, Python {fields['python']}"
    )


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned to the right, but for the first."""
    rules = ["---"] + ["---:"] * (len(heads) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rules, *rows))


def with_quartiles(value: float, quartiles: tuple[float, float], form: str = ".2f") -> str:
    """A median and, in brackets, its quartiles."""
    low, high = quartiles
    return f"{value:{form}} ({low:{form}}–{high:{form}})"


def parse_names(text: str, known: Sequence[str]) -> list[str]:
    """Names from "a,b". Raises Dsr1Error for one that is not known."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise Dsr1Error(f"there is no {name!r} to measure; give some of {','.join(known)}")
    return names


def write_json(path: Path | None, fields: dict[str, Any]) -> None:
    """Write `fields`, if anybody wants them."""
    if path is not None:
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _cpu_fields(cpuinfo: Path) -> dict[str, str]:
    """The first processor's lines; empty where the system has no such file."""
    try:
        first = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}

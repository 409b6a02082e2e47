"""How much memory a model took, beside what its plan says.

Planned are the model's files and what is allocated for it. Taken are the model's files that this process has mapped,
whether Linux holds their pages or not, and the anonymous memory that it touched since before the model was loaded.
"""

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from offload.plan import Plan

SELF = Path("/proc/self")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. planned: by the plan. mapped: of the model's files. anonymous: everything else."""

    planned: int
    mapped: int
    anonymous: int

    @property
    def taken(self) -> int:
        return self.mapped + self.anonymous


def memory_use(plan: Plan, folder: Path, before: int) -> MemoryUse:
    """What a loaded model takes. before: anonymous_bytes before it was loaded.

    A store's files hold each matrix in a second form, too, which is mapped and never read: some 2 % of all.
    """
    return MemoryUse(plan.ram_bytes, mapped_bytes(folder), max(0, anonymous_bytes() - before))


def mapped_bytes(folder: Path) -> int:
    """Bytes of the files in `folder` that are mapped; 0 where the system does not tell."""
    total, inside = 0, f"{folder.absolute()}/"
    for line in _lines("maps"):
        span, _, rest = line.partition(" ")
        if inside in rest:
            first, last = (int(end, 16) for end in span.split("-"))
            total += last - first
    return total


def anonymous_bytes() -> int:
    """Anonymous memory that this process holds in RAM; 0 where the system does not tell.

    Freed memory that the C library keeps would be taken again and count for nobody, so it is given back before.
    """
    with suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)
    for line in _lines("status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 2**10
    return 0


def _lines(name: str) -> list[str]:
    try:
        return (SELF / name).read_text().splitlines()
    except OSError:
        return []

"""Instruction sets: what the kernels use, out of what the processor has and the system grants.

The best one is taken, once a process. Another is taken by `force`, before Numba is imported, because LLVM compiles for
what Numba finds at its import. `amx` and `avx512` are one target for LLVM and differ in what the kernels do.
"""

import ctypes
import os
import platform
import sys
from functools import cache
from typing import Any, NamedTuple

from quant.errors import UsageError

X86 = platform.machine().lower() in ("x86_64", "amd64")
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18  # Linux on x86-64


class InstructionSet(NamedTuple):
    """What code may use: LLVM's names of it, and the processor for which LLVM then compiles (None: the one at hand)."""

    title: str
    features: tuple[str, ...]
    processor: str | None


AVX2 = ("ssse3", "avx2", "f16c", "fma")
AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512vnni")
INSTRUCTION_SETS = {  # the best first
    "amx": InstructionSet("AMX tiles of bytes, AVX-512 VNNI", (*AVX2, *AVX512, "amx-tile", "amx-int8"), None),
    "avx512": InstructionSet("AVX-512 VNNI", (*AVX2, *AVX512), None),
    "avxvnni": InstructionSet("AVX-VNNI", (*AVX2, "avxvnni"), "haswell"),
    "avx2": InstructionSet("AVX2", AVX2, "haswell"),
    "portable": InstructionSet("what every processor of its kind has", (), "generic"),
}

_forced: str | None = None


def force(name: str) -> None:
    """Use this instruction set in this process. Raises UsageError for what is not there, or once Numba is imported."""
    global _forced
    _refuse_missing(name)
    if _is_settled():
        if name != current():
            raise UsageError(
                f"the instruction set of this process is {current()} by now; choose {name} in a process of its own, "
                "without NUMBA_CPU_NAME and before Numba is imported"
            )
        return
    processor = INSTRUCTION_SETS[name].processor
    if processor is not None:
        os.environ["NUMBA_CPU_NAME"] = processor
        os.environ["NUMBA_CPU_FEATURES"] = ",".join(f"+{feature}" for feature in INSTRUCTION_SETS[name].features)
    _forced = name


def _is_settled() -> bool:
    return _forced is not None or "numba" in sys.modules or bool(os.environ.get("NUMBA_CPU_NAME"))


def _refuse_missing(name: str) -> None:
    there = ", ".join(available())
    if name not in INSTRUCTION_SETS:
        raise UsageError(f"there is no instruction set {name!r}; here you can give {there}")
    if name not in available():
        limit = os.environ.get("NUMBA_CPU_NAME")
        reason = f"NUMBA_CPU_NAME is {limit}" if limit else "the processor lacks it, or the system does not grant it"
        raise UsageError(f"{name} ({INSTRUCTION_SETS[name].title}) is not there: {reason}; here you can give {there}")


@cache
def available() -> tuple[str, ...]:
    """Names of the instruction sets that this process may use, the best first."""
    return tuple(name for name, isa in INSTRUCTION_SETS.items() if _may_use(name, isa))


def _may_use(name: str, isa: InstructionSet) -> bool:
    if isa.features and not X86:
        return False
    return all(processor_has(feature) for feature in isa.features) and (name != "amx" or request_tiles())


def current() -> str:
    """The name of the instruction set that the kernels use."""
    return _forced or available()[0]


def has_tiles() -> bool:
    """Whether kernels use AMX: products of tiles of bytes."""
    return current() == "amx"


@cache
def request_tiles() -> bool:
    """Ask Linux to let this process use AMX's tile registers, which does no harm; tell whether it may."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0


def processor_has(feature: str) -> bool:
    """Whether code may use an x86 instruction set (by LLVM's name); other processors have what is asked for here."""
    if not X86 and platform.machine().lower() != "i686":
        return True
    if os.environ.get("NUMBA_CPU_NAME"):
        return f"+{feature}" in os.environ.get("NUMBA_CPU_FEATURES", "").split(",")
    return bool(_host_features().get(feature))


def x86_has(feature: str) -> bool:
    return X86 and processor_has(feature)


@cache
def _host_features() -> dict[str, Any]:
    from llvmlite import binding

    return dict(binding.get_host_cpu_features())

"""Instruction sets: what the kernels may use on this processor."""

import platform
from typing import Any

import numba
from llvmlite import binding


def processor_has(feature: str) -> bool:
    """Whether code may use an x86 instruction set (by LLVM's name); other processors have what is asked for here."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return True
    config: Any = numba.config
    if config.CPU_NAME:
        return f"+{feature}" in (config.CPU_FEATURES or "")
    return bool(binding.get_host_cpu_features().get(feature))


def x86_has(feature: str) -> bool:
    return platform.machine().lower() in ("x86_64", "amd64") and processor_has(feature)


def instruction_set() -> str:
    """What the packed kernels multiply bytes with on this processor, by LLVM's name of it."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return platform.machine().lower()
    names = ("avx512vnni", "avxvnni", "avx512bw", "avx2", "ssse3")
    return next((name for name in names if processor_has(name)), "sse2")

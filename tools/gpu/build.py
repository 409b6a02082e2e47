"""Compiles every GPU kernel for every architecture, without a GPU, and tells what the compiler made of it.

    python -m tools.gpu.build [--arch 89] [--json]

Registers and stack are read from the machine code, shared memory from Triton, instructions from the PTX. A stack means
spilled registers. Wants Triton, and that TRITON_INTERPRET is not set.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tools.gpu.variants import DOT, WIDE, Variant, variants

ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a program may have
NATIVE_FP8_FROM = 89
PRODUCT = re.compile(r"\bmma\.sync|\bwgmma\.mma_async")
COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global [^;]*, 0x(\w+),")  # hexadecimal bytes, to shared memory
WIDE_SHARE = 0.8  # of the copied bytes that must go 16 at a time; what is left are headers of blocks and scales of rows


@dataclass(frozen=True)
class Built:
    """What a kernel takes on one architecture. stack, shared: bytes of a thread and of a program."""

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    warps: int
    has: tuple[str, ...]
    wants: tuple[str, ...]


def build(variant: Variant, arch: int) -> Built:
    """Compile one kernel for one architecture."""
    names = variant.kernel.arg_names
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.even()}
    source = ASTSource(variant.kernel, variant.signature(), constants, attributes)
    options = {"num_warps": variant.config.warps, "num_stages": variant.config.stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _resources(made.asm["cubin"])
    has = tuple(_instructions(made.asm["ptx"]))
    return Built(variant.name, arch, registers, stack, made.metadata.shared, variant.config.warps, has, variant.wants)


def _instructions(ptx: str) -> Iterator[str]:
    """What a kernel's code has of the things that variants may want."""
    if PRODUCT.search(ptx):
        yield DOT
    copied = [int(size, 16) for size in COPY.findall(ptx)]
    if copied and sum(size for size in copied if size == 16) >= WIDE_SHARE * sum(copied):
        yield WIDE


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, f"cuobjdump says {said}"
    return int(found[1]), int(found[2])


def build_all(architectures: tuple[int, ...] = ARCHITECTURES) -> list[Built]:
    """All kernels for all architectures; two at a time, as the compiler leaves Python free."""
    jobs = [
        (variant, arch)
        for variant in variants()
        for arch in architectures
        if arch >= NATIVE_FP8_FROM or not variant.newest_only
    ]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: build(*job), jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    made = build_all(tuple(options.arch or ARCHITECTURES))
    if options.json:
        print(json.dumps([asdict(each) for each in made]))
        return
    for each in made:
        row: dict[str, Any] = asdict(each)
        print(
            "{name:40} sm_{arch:<4} {registers:4} registers {stack:5} stack {shared:7} shared".format(**row), *each.has
        )


if __name__ == "__main__":
    main()

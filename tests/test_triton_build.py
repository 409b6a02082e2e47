"""The GPU kernels compile for every architecture, without spills, within the chip's shared memory, as designed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is missing; torch's wheels for CUDA and the extra `test` bring it")

ROOT = Path(__file__).parent.parent
SHARED_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a program may have
REGISTERS = 64 << 10  # of a processor


@pytest.fixture(scope="module")
def built() -> list[dict[str, Any]]:
    """What the compiler made, in a process where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.gpu.build", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_architecture_gets_every_kernel(built: list[dict[str, Any]]) -> None:
    names = {arch: {each["name"] for each in built if each["arch"] == arch} for arch in SHARED_LIMITS}
    assert len(names[89]) >= 45 and names[89] == names[90] == names[120]
    assert {name for name in names[89] if "native" not in name} == names[80] == names[86]


def test_nothing_is_spilled(built: list[dict[str, Any]]) -> None:
    assert not [(each["name"], each["arch"]) for each in built if each["stack"]]
    assert all(each["registers"] * each["warps"] * 32 <= REGISTERS for each in built)


def test_shared_memory_is_within_the_limit(built: list[dict[str, Any]]) -> None:
    assert not [(each["name"], each["arch"]) for each in built if each["shared"] > SHARED_LIMITS[each["arch"]]]


def test_the_code_has_the_instructions_of_the_design(built: list[dict[str, Any]]) -> None:
    """Products on tensor cores; weights and cache rows copied to shared memory 16 bytes a thread."""
    assert not [(each["name"], each["arch"]) for each in built if not {*each["wants"]} <= {*each["has"]}]

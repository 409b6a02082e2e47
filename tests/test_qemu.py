"""The kernels for AVX2 on a processor that has nothing newer, which QEMU pretends to be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quant import isa
from tests.test_kernels import ROOT

QEMU = "qemu-x86_64"
TESTS = ["tests/test_kernels.py", "tests/test_packed_kernels.py", "-k", "test_linear or test_moe_experts"]


def run_tests(cache: Path, *emulator: str) -> None:
    """Those of the kernels, compiled for Haswell. Tests draw the same examples each time."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in isa.AVX2),
    }
    command = [*emulator, sys.executable, "-m", "pytest", "-x", "--hypothesis-seed=0", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in isa.available(), reason="the kernels are compiled natively, which needs AVX2")
@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed; it is in Debian's package qemu-user")
def test_kernels_for_avx2_on_a_processor_without_more(tmp_path: Path) -> None:
    run_tests(tmp_path)  # natively, because compiling takes an emulated processor minutes; the code stays in the cache
    run_tests(tmp_path, QEMU, "-cpu", "Haswell")

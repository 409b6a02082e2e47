"""Instruction sets: what is there, and forcing one. Each choice needs a process of its own."""

import platform
from collections.abc import Iterator

import pytest

from quant import isa
from quant.errors import UsageError
from tests.test_kernels import run_python

X86 = pytest.mark.skipif(not isa.X86, reason="these are instruction sets of x86")


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """The features that a made-up x86 processor has, under a system that grants AMX."""
    features: dict[str, bool] = {}
    monkeypatch.delenv("NUMBA_CPU_NAME", raising=False)
    monkeypatch.setattr(isa, "X86", True)
    monkeypatch.setattr(isa, "_host_features", lambda: features)
    monkeypatch.setattr(isa, "request_tiles", lambda: True)
    isa.available.cache_clear()
    yield features
    isa.available.cache_clear()


def have(features: dict[str, bool], *names: str) -> None:
    features.update(dict.fromkeys(names, True))
    isa.available.cache_clear()


def test_what_a_processor_has_and_the_system_grants(
    processor: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isa.available() == ("portable",)
    have(processor, *isa.AVX2)
    assert isa.available() == ("avx2", "portable")
    have(processor, "avx512f", "avx512bw", "avx512vl")
    assert isa.available() == ("avx2", "portable")
    have(processor, "avx512vnni", "amx-tile")
    assert isa.available() == ("avx512", "avx2", "portable")
    have(processor, "amx-int8", "avxvnni")
    assert isa.available() == ("amx", "avx512", "avxvnni", "avx2", "portable") and isa.has_tiles()
    monkeypatch.setattr(isa, "request_tiles", lambda: False)
    isa.available.cache_clear()
    assert isa.current() == "avx512" and not isa.has_tiles()


def test_a_missing_instruction_set_is_refused_with_those_that_are_there(processor: dict[str, bool]) -> None:
    have(processor, *isa.AVX2)
    with pytest.raises(UsageError, match="avx512 .AVX-512 VNNI. is not there: the processor lacks it.* avx2, portable"):
        isa.force("avx512")
    with pytest.raises(UsageError, match="no instruction set 'sse'; here you can give avx2, portable"):
        isa.force("sse")


def test_other_processors_have_one(monkeypatch: pytest.MonkeyPatch, processor: dict[str, bool]) -> None:
    monkeypatch.setattr(isa, "X86", False)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert isa.available() == ("portable",) and isa.processor_has("fma") and not isa.x86_has("avx2")


def test_it_is_too_late_once_numba_is_imported() -> None:
    isa.force(isa.current())
    if isa.current() != "portable":
        with pytest.raises(UsageError, match=f"is {isa.current()} by now; choose portable in a process of its own"):
            isa.force("portable")


FORCED = """
from quant import isa
isa.force({name!r})
import numba
codegen = numba.core.registry.cpu_target.target_context.codegen()
print(isa.current(), isa.has_tiles(), codegen._get_host_cpu_name(), isa.x86_has("avx2"), isa.x86_has("avx512vnni"))
"""


@X86
@pytest.mark.parametrize("name", isa.available())
def test_numba_compiles_for_the_forced_one(name: str) -> None:
    found = run_python(FORCED.format(name=name)).split()
    assert found[:2] == [name, str(name == "amx")]
    assert found[3:] == [str(name != "portable"), str(name in ("amx", "avx512"))]
    if isa.INSTRUCTION_SETS[name].processor is not None:
        assert found[2] == isa.INSTRUCTION_SETS[name].processor


@X86
def test_a_process_has_one_choice() -> None:
    script = """
from quant import isa
from quant.errors import UsageError
isa.force("portable")
isa.force("portable")
try:
    isa.force("avx2" if "avx2" in isa.available() else "sse")
except UsageError:
    print(isa.current())
"""
    assert run_python(script) == "portable\n"


@X86
@pytest.mark.skipif("avx2" not in isa.available(), reason="needs AVX2")
def test_a_processor_named_to_numba_counts() -> None:
    script = """
from quant import isa
from quant.errors import UsageError
print(isa.current())
try:
    isa.force("avx512")
except UsageError as error:
    print(error)
"""
    first, second = run_python(script, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+ssse3,+avx2,+f16c,+fma").split(
        "\n", 1
    )
    assert first == "avx2" and "NUMBA_CPU_NAME is haswell" in second

"""Machine code on disk, and kernels compiled before they are wanted. Most need processes of their own."""

import os
import shutil
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest

from quant.kernels import ahead, cache
from quant.kernels.jit import COMPILABLE, Compiled
from tests.test_kernels import run_python

SMALL_KERNELS = """
from quant.kernels.jit import Compiled, Kernel

def _triple(x, parts):
    return 3 * x * parts

def _square(x):
    return x * x

def _part(arguments, part, parts, sync):
    return 10 * part

triple = Compiled(_triple, "int64(int64, int64)")
square = Compiled(_square, "int64(int64)")
part = Kernel(_part)
"""
RUN_TRIPLE = """
import small_kernels
assert small_kernels.triple(7, 2) == 42
stats = small_kernels.triple.compile().stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""
FOUND, COMPILED = "1 0\n", "0 1\n"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder for the user's cache, in which processes find a module of two kernels to import."""
    (tmp_path / "small_kernels.py").write_text(SMALL_KERNELS)
    return tmp_path


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a folder after a first process."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "small_kernels.py").write_text(SMALL_KERNELS)
    assert run_small(RUN_TRIPLE, folder) == COMPILED
    return folder


@pytest.fixture
def second(first: Path, tmp_path: Path) -> Path:
    """A copy of the folder, for a second process."""
    return Path(shutil.copytree(first, tmp_path / "second"))


def run_small(script: str, folder: Path) -> str:
    return run_python(f"import sys; sys.path.append({str(folder)!r})\n{script}", folder)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "dsr1/kernels").rglob("*") if path.is_file())


def test_second_process_finds_the_compiled_kernels(second: Path) -> None:
    assert [file.name for file in files(second)] == ["small_kernels._triple.bin"]
    assert run_small(RUN_TRIPLE, second) == FOUND


def test_two_processes_may_compile_at_once(small: Path) -> None:
    results: list[str] = []
    work = [threading.Thread(target=lambda: results.append(run_small(RUN_TRIPLE, small))) for _ in range(2)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    [file] = files(small)
    assert len(results) == 2 and cache._read_checked(file) is not None


def test_a_damaged_file_is_compiled_anew(second: Path) -> None:
    [file] = files(second)
    file.write_bytes(file.read_bytes()[:1000])
    assert run_small(RUN_TRIPLE, second) == COMPILED and cache._read_checked(file) is not None


def test_damage_is_seen(tmp_path: Path) -> None:
    file, content = tmp_path / "kernels/x.bin", b"machine code"
    cache._write_whole(file, sha256(content).digest() + content)
    assert cache._read_checked(file) == content
    whole = file.read_bytes()
    for damaged in (b"", whole[:10], whole[:-1], whole[:-1] + b"f", b"S" + whole):
        file.write_bytes(damaged)
        assert cache._read_checked(file) is None
    assert cache._read_checked(tmp_path) is None


def test_an_unwritable_cache_folder_is_done_without(small: Path) -> None:
    (small / "dsr1").write_text("a file where the folder should be")
    assert run_small(RUN_TRIPLE, small) == COMPILED


def test_a_read_only_cache_folder_is_read(second: Path) -> None:
    read_only = "import pathlib, quant.kernels.cache as it\n"  # root may write where nobody else may
    read_only += "def refuse(*_): raise PermissionError\n"
    read_only += "pathlib.Path.write_bytes = pathlib.Path.mkdir = it.os.utime = refuse\n"
    assert run_small(read_only + RUN_TRIPLE + "print(small_kernels.square(9))", second) == FOUND + "81\n"
    assert len(files(second)) == 1


def test_the_cache_is_another_for_other_sources_and_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache._fingerprint()
    monkeypatch.setattr("numba.__version__", "0.0")
    other_version = cache._fingerprint()
    monkeypatch.setattr("quant.isa.current", lambda: "sse9")
    assert len({before, other_version, cache._fingerprint()}) == 3


def test_folders_that_nobody_used_for_a_month_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, recent, ours = (tmp_path / "kernels" / name for name in ("old", "recent", cache._fingerprint()))
    for folder, days in ((old, 31), (recent, 29)):
        folder.mkdir(parents=True)
        (folder / "x.bin").write_bytes(b"x")
        os.utime(folder, (0, time.time() - days * 24 * 3600))
    cache._write_whole(ours / "y.bin", b"y")
    assert not old.exists() and recent.exists() and (ours / "y.bin").read_bytes() == b"y"
    os.utime(ours, (0, 0))
    monkeypatch.setattr(cache, "user_cache", lambda: tmp_path)
    cache.cache_folder.__wrapped__()
    assert ours.stat().st_mtime > time.time() - 60


def test_kernels_have_names_of_their_own() -> None:
    def kernel(x):  # type: ignore[no-untyped-def]
        return x

    try:
        assert Compiled(kernel, "int64(int64)", "first").name == "first"
        with pytest.raises(ValueError, match="two kernels called first"):
            Compiled(kernel, "int64(int64)", "first")
    finally:
        COMPILABLE.pop("first", None)


AHEAD = """
import small_kernels
from quant.kernels import ahead
ahead.POOL_KERNELS = ()
told, here = [], []
compile_kernel = ahead.Compilable.compile
def compile_here(kernel):
    if not kernel.ready:
        here.append(kernel.name)
    return compile_kernel(kernel)
ahead.Compilable.compile = compile_here
{before}
ahead.compile_ahead([small_kernels.triple, small_kernels.square], lambda done, total: told.append((done, total)))
ahead.compile_ahead([small_kernels.triple, small_kernels.square], lambda done, total: told.append("again"))
assert small_kernels.triple(7, 2) == 42 and small_kernels.square(5) == 25
print(told, [name.removeprefix("small_kernels._") for name in here])
"""
ALL_TOLD = [(0, 2), (1, 2), (2, 2), (2, 2)]


@pytest.mark.skipif(ahead.MAX_THREADS == 1, reason="one core has no room for a helper")
def test_a_helper_compiles_the_last_kernels(small: Path) -> None:
    wait_for_helper = """
import time
def compile_first_kernel_slowly(kernel):
    while kernel is small_kernels.triple and not small_kernels.square.ready:
        time.sleep(0.05)
    return compile_here(kernel)
ahead.Compilable.compile = compile_first_kernel_slowly
"""
    assert run_small(AHEAD.format(before=wait_for_helper), small) == f"{ALL_TOLD} ['triple']\n"


HELPERS_THAT_FAIL = """
import sys
from quant.kernels import ahead
from quant.kernels.jit import Compiled
ahead.POOL_KERNELS = ()

def _double(x):
    return 2 * x

interpreter = sys.executable
for number, (executable, helper) in enumerate([
    ("", ""),
    ("/nothing", ""),
    (interpreter, "raise SystemExit"),
    (interpreter, "print(); input()"),
    (interpreter, "while True: print()"),
    (interpreter, "import time; time.sleep(1000)"),
]):
    sys.executable, ahead.HELPER = executable, helper
    kernels = [Compiled(_double, "int64(int64)", f"double-{number}-{which}") for which in range(3)]
    told = []
    ahead.compile_ahead(kernels, lambda *step: told.append(step))
    assert told[0] == (0, 3) and told[-1] == (3, 3) and all(kernel(4) == 8 for kernel in kernels)
"""


def test_without_a_helper_everything_is_compiled_here(tmp_path: Path) -> None:
    run_python(HELPERS_THAT_FAIL, tmp_path)


def test_an_engine_compiles_nothing_in_the_middle_of_an_answer() -> None:
    script = """
from hybrid_rt import Engine, Sampling
from quant.kernels.jit import COMPILABLE
compiled = lambda: {name for name, kernel in COMPILABLE.items() if kernel.compiled}
for model in ("nano-r1", "nano-r1-fp8"):
    engine = Engine.load(model)
    before = compiled()
    list(engine.generate(6 * list(range(100, 140)), Sampling(temperature=0, max_new_tokens=2)))
    assert compiled() == before, compiled() - before
"""
    run_python(script)

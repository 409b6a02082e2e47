"""`dsr1 doctor`: each check on folders that look like /proc and /sys, and the command as a whole."""

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cli import doctor as command
from offload import hardware
from offload.checks import bandwidth as bandwidth_module
from offload.checks import disk as disk_module
from offload.checks.bandwidth import bandwidth
from offload.checks.check import Check, worst
from offload.checks.disk import any_disk, disk, read_speed
from offload.checks.folders import hub_cache, kernel_cache
from offload.checks.gpu import gpu
from offload.checks.memory import huge_pages, locked_memory, numa, overcommit, ram, swap
from offload.checks.models import models
from offload.checks.processor import amx, cores, instruction_sets, processor
from offload.checks.software import operating_system, packages
from offload.checks.speeds import kept_speeds
from offload.doctor import examine
from offload.hardware import Gpu, GpuMemory, cpu_quota, lockable, memory_limit
from offload.machine import load_machine
from offload.this_machine import TYPICAL
from offload.topology import Node, Topology
from quant.errors import CheckpointError, UsageError

GIB = 2**30
VNNI = "fpu avx2 avx512bw avx512_vnni avx_vnni"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def cpuinfo(root: Path, flags: str) -> Path:
    first = f"processor\t: 0\nmodel name\t: Xeon: a name\nflags\t\t: {flags}\n"
    return write(root, {"proc/cpuinfo": first + "\nprocessor\t: 1\nmodel name\t: another\nflags\t\t: none\n"})


def found(check: Check | None) -> Check:
    """A check with the form that all have: a remedy exactly where something is amiss."""
    assert check is not None
    assert check.name and check.value and bool(check.remedy) == (check.verdict != "ok"), check
    assert "\n" not in check.value + check.remedy
    return check


def test_the_worst_verdict_counts() -> None:
    ok = Check("a", "b")
    bad, worse = replace(ok, verdict="attention"), replace(ok, verdict="problem")
    assert [worst(some) for some in ([], [ok], [ok, bad, ok], [worse, bad])] == ["ok", "ok", "attention", "problem"]


def test_processor_is_the_first_one_named(tmp_path: Path) -> None:
    assert found(processor(cpuinfo(tmp_path, VNNI))).value.startswith("Xeon: a name (")
    assert platform.machine() in found(processor(tmp_path / "nothing")).value


@pytest.mark.parametrize(
    ("quota", "verdict", "remedy"),
    [(None, "ok", ""), (8.0, "ok", ""), (2.5, "attention", "--threads 2;"), (0.5, "attention", "--threads 1;")],
)
def test_cores_under_a_quota(quota: float | None, verdict: str, remedy: str) -> None:
    check = found(cores(8, 16, quota))
    assert check.verdict == verdict and remedy in check.remedy and check.value.startswith("8 of 16")


def test_the_instruction_set_that_kernels_use() -> None:
    best = found(instruction_sets(("amx", "avx2", "portable"), None))
    assert best.value == "kernels use amx; --isa can choose avx2, portable"
    overridden = found(instruction_sets(("avx2", "portable"), "haswell"))
    assert overridden.verdict == "attention" and "NUMBA_CPU_NAME is haswell" in overridden.value


def test_a_processor_without_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.checks.processor.X86", True)
    assert found(instruction_sets(("portable",), None)).verdict == "attention"
    monkeypatch.setattr("offload.checks.processor.X86", False)
    assert found(instruction_sets(("portable",), None)) == Check("instruction sets", "kernels use portable")


def test_amx_needs_the_processor_and_the_system(tmp_path: Path) -> None:
    def never() -> bool:
        raise AssertionError("asked for what the processor does not have")

    assert found(amx(cpuinfo(tmp_path, VNNI + " amx_tile"), never)).value == "no"
    root = cpuinfo(tmp_path, VNNI + " amx_bf16 amx_tile amx_int8")
    granted, refused = found(amx(root, lambda: True)), found(amx(root, lambda: False))
    assert granted.verdict == "ok" and granted.value.endswith("kernels use it")
    assert refused.verdict == "attention" and "not granted" in refused.value
    assert amx(tmp_path / "nothing", never) is None


def test_ram_is_a_problem_where_none_is_left() -> None:
    check = found(ram(64 * GIB, 48 * GIB, 32 * GIB, 30 * GIB))
    assert check.verdict == "ok"
    assert all(size in check.value for size in ("64.0 GiB", "48.0 GiB available", "32.0 GiB allowed", "30.0 GiB for"))
    assert "allowed" not in found(ram(64 * GIB, 48 * GIB, None, 46 * GIB)).value
    assert found(ram(4 * GIB, GIB, None, 0)).verdict == "problem"


@pytest.mark.parametrize("setting", ["[always] madvise never", "always [madvise] never", "always madvise [never]"])
def test_huge_pages(tmp_path: Path, setting: str) -> None:
    assert huge_pages(tmp_path) is None
    check = found(huge_pages(write(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": setting + "\n"})))
    assert f"[{check.value.partition(';')[0]}]" in setting
    assert check.verdict == ("attention" if "[never]" in setting else "ok")


def test_locked_memory_is_the_limit_or_the_right_to_pass_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 * 2**20, 2**40))
    assert lockable(tmp_path) == 8 * 2**20
    write(tmp_path, {"self/status": "Name:\tdsr1\nCapEff:\t00000000a80425fb\n"})  # as Docker gives
    assert lockable(tmp_path) == 8 * 2**20
    write(tmp_path, {"self/status": "Name:\tdsr1\nCapEff:\t000001ffffffffff\n"})
    assert lockable(tmp_path) is None
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert lockable(tmp_path / "nothing") is None
    assert found(locked_memory(None)).value.startswith("unlimited")
    assert found(locked_memory(2**23)).value.startswith("up to 8.0 MiB")


def test_strict_overcommit(tmp_path: Path) -> None:
    meminfo = "MemTotal:  99 kB\nCommitLimit:   12582912 kB\nCommitted_AS:  4194304 kB\n"
    write(tmp_path, {"proc/sys/vm/overcommit_memory": "2\n", "proc/meminfo": meminfo})
    check = found(overcommit(tmp_path))
    assert check.verdict == "attention" and "4.0 GiB of 12.0 GiB" in check.value
    (tmp_path / "proc/sys/vm/overcommit_memory").write_text("1\n")
    assert found(overcommit(tmp_path)).value == "1"
    assert overcommit(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("total", "free", "value", "verdict"),
    [(0, 0, "none", "ok"), (8, 8, "0 bytes of", "ok"), (8, 5, "3.0 GiB of 8.0 GiB in use", "attention")],
)
def test_swap(tmp_path: Path, total: int, free: int, value: str, verdict: str) -> None:
    kib = GIB // 2**10
    check = found(swap(write(tmp_path, {"proc/meminfo": f"SwapTotal: {total * kib} kB\nSwapFree: {free * kib} kB\n"})))
    assert check.verdict == verdict and check.value.startswith(value)
    assert swap(tmp_path / "nothing") is None


def nodes(*available: int) -> Topology:
    return Topology(tuple(Node(number, (number,), 64 * GIB, left * GIB) for number, left in enumerate(available)))


def test_numa_nodes_get_experts_as_far_as_the_fullest_has_room() -> None:
    assert numa(Topology((Node(0, (0,), 0, 0),))) is None
    assert found(numa(nodes(5))).value == "1"
    even = found(numa(nodes(40, 50)))
    assert (
        even.verdict == "ok" and "40.0 GiB of 64.0 GiB free, 50.0 GiB" in even.value and "up to 80.0 GiB" in even.value
    )
    uneven = found(numa(nodes(10, 50)))
    assert uneven.verdict == "attention" and "up to 20.0 GiB" in uneven.value and "stay mapped" in uneven.remedy


def model_of(folder: Path, mib: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "small.safetensors").write_bytes(b"some")
    (folder / "large.safetensors").write_bytes(os.urandom(2**20) * mib)
    return folder


def test_a_disk_is_measured_with_the_largest_file_of_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = model_of(tmp_path / "cache/model", 9)
    assert "9.0 MiB in files that are too small" in found(disk(folder)).value
    assert "too small" in found(disk(tmp_path / "nothing")).value
    monkeypatch.setattr(disk_module, "LEAST_BYTES", 2**20)
    assert f"{folder}: read at " in found(disk(folder)).value
    assert str(folder) in found(any_disk([tmp_path / "nothing", tmp_path])).value
    assert "--measure MODEL" in found(any_disk([tmp_path / "nothing"])).value
    monkeypatch.setattr(disk_module, "read_speed", lambda path: 1e3 if path.name == "large.safetensors" else 0)
    slow = found(disk(folder))
    assert slow.verdict == "attention" and "9.0 MiB are loaded in 157 min" in slow.value
    monkeypatch.setattr(disk_module, "read_speed", lambda path: 1e6)
    assert "are loaded in 9 s" in found(disk(folder)).value


@pytest.mark.parametrize("direct", [True, False])
def test_reading_ends_with_the_file_or_the_time(direct: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    path = model_of(tmp_path / "model", 40) / "large.safetensors"
    read: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(args[2]) or preadv(*args))
    assert read_speed(path, 60) > 0
    assert set(read) == {number * 2**22 for number in range(10)} and len(read) in (10, 11)  # one to try how
    read.clear()
    read_speed(path, -1.0)
    assert set(read) <= {0}


def test_a_file_system_that_cannot_pass_the_page_cache_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, real = model_of(tmp_path / "model", 8) / "large.safetensors", os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    assert read_speed(path) > 0


def test_gpu_is_named_with_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert found(gpu([])).value.startswith("none")
    told = found(gpu([Gpu("RTX 4090", "550.54", GpuMemory(23 * GIB, 24 * GIB))])).value
    assert told == "RTX 4090, 23.0 GiB of 24.0 GiB free, driver 550.54; not used by this version"
    rows = {"memory.free,memory.total,driver_version,name": [["1", "2", "9", "A"], ["[N/A]", "[N/A]", "9", "B"], [""]]}
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda fields: rows[fields])
    assert hardware.gpus() == [Gpu("A", "9", GpuMemory(2**20, 2**21))]
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.gpus() == []


def test_measuring_reads_what_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant.kernels import threads

    monkeypatch.setattr(threads, "_count", threads._count)  # set back afterwards
    monkeypatch.setattr(bandwidth_module, "_load", lambda: 100.0)
    assert found(bandwidth(64 * 2**20)).verdict == "attention"
    monkeypatch.setattr(bandwidth_module, "_load", lambda: 0.0)
    monkeypatch.setattr(bandwidth_module, "ONE_CHANNEL", 1e15)
    assert "one memory channel" in found(bandwidth(64 * 2**20)).remedy
    monkeypatch.setattr(bandwidth_module, "ONE_CHANNEL", 0)
    check = found(bandwidth(64 * 2**20))
    assert check.verdict == "ok"
    speed, _, rest = check.value.partition(" GB/s, reading 32.0 MiB with ")
    assert float(speed) > 0 and rest[0] in "123456789"
    assert found(bandwidth(0)).verdict == "problem"


def test_operating_systems(tmp_path: Path) -> None:
    write(tmp_path, {"etc/os-release": 'NAME=x\nPRETTY_NAME="Debian 12"\n', "proc/sys/kernel/osrelease": "6.1.0\n"})
    assert found(operating_system(tmp_path, "Linux")).value == "Debian 12, Linux 6.1.0"
    assert found(operating_system(tmp_path / "nothing", "Linux")).value == "Linux"
    assert found(operating_system(tmp_path, "Darwin")).verdict == "attention"
    write(tmp_path, {"proc/sys/kernel/osrelease": "5.15.1-microsoft-standard-WSL2\n"})
    assert ".wslconfig" in found(operating_system(tmp_path, "Linux")).remedy


def test_packages_that_are_missing_are_a_problem() -> None:
    assert found(packages()).verdict == "ok"
    check = found(packages(["dsr1", "no-such-package"]))
    assert check.verdict == "problem" and "no-such-package missing" in check.value


def test_kernel_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "kernels"
    assert "empty" in found(kernel_cache(folder)).value and not folder.exists()
    write(folder, {"abc/x.bin": "12", "def/y.bin": "345", "abc/.z.part": "6"})
    assert "2 compiled kernels, 5 bytes" in found(kernel_cache(folder)).value
    assert found(kernel_cache(folder / "abc/x.bin")).verdict == "attention"  # a file, in which no folder can be made


def test_hub_cache_looks_at_the_disk_it_would_be_made_on(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    assert found(hub_cache(folder, 40 * GIB)).value == f"{folder}: 40.0 GiB free on its disk"
    assert "HF_HOME" in found(hub_cache(folder, 5 * GIB)).remedy
    assert "free on its disk" in found(hub_cache(folder)).value
    (tmp_path / "not").write_text("")
    assert "not writable" in found(hub_cache(folder, 40 * GIB)).value


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans do not depend on what was measured of this machine before."""
    monkeypatch.setattr("offload.checks.models.machine_for", lambda _: load_machine(TYPICAL))


def test_which_models_fit(unmeasured: None) -> None:
    some = found(models(20 * GIB))
    assert some.verdict == "ok"
    r1, moonlight = some.value.split("; ")
    assert r1.startswith("DeepSeek-R1 needs 36") and r1.endswith("no")
    assert re.match(r"Moonlight-16B-A3B takes (9|10)\.\d GiB", moonlight) and moonlight.endswith("yes")
    none = found(models(2**20))
    assert none.verdict == "attention" and "yes" not in none.value and "nano-r1" in none.remedy
    assert "no" not in found(models(512 * GIB)).value.split()


def test_a_model_that_does_not_fit_fits_in_what_it_is_said_to_need(unmeasured: None) -> None:
    needed = float(found(models(2**20)).value.split("Moonlight-16B-A3B needs ")[1].split()[0])
    assert "Moonlight-16B-A3B takes" in models(int((needed + 0.1) * GIB)).value
    assert "Moonlight-16B-A3B needs" in models(int((needed - 0.3) * GIB)).value


MEMORY_STAT = "cache 7\nanon 1000\ntotal_rss 1000\n"


def test_limits_of_version_2_count_up_to_the_mount(tmp_path: Path) -> None:
    cgroup, proc = tmp_path / "sys/fs/cgroup", tmp_path / "proc"
    assert memory_limit(cgroup, proc) is None and cpu_quota(cgroup, proc) is None
    write(proc, {"self/cgroup": "0::/a.slice/b.scope\n"})
    write(cgroup, {f"{group}/memory.stat": MEMORY_STAT for group in ("a.slice", "a.slice/b.scope")})
    write(cgroup, {"a.slice/memory.max": "5000\n", "a.slice/b.scope/memory.max": "max\n"})
    write(cgroup, {"a.slice/cpu.max": "max 100000\n", "a.slice/b.scope/cpu.max": "150000 100000\n"})
    assert memory_limit(cgroup, proc) == 5000 and cpu_quota(cgroup, proc) == 1.5
    (cgroup / "a.slice/b.scope/memory.max").write_text("3000")
    assert memory_limit(cgroup, proc) == 3000


def test_limits_of_version_1(tmp_path: Path) -> None:
    cgroup, proc = tmp_path / "sys/fs/cgroup", tmp_path / "proc"
    write(proc, {"self/cgroup": "12:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n3:cpuset:/../y\n0::/\nnonsense\n"})
    write(cgroup, {"memory/docker/x/memory.limit_in_bytes": "6000\n", "memory/docker/x/memory.stat": MEMORY_STAT})
    write(cgroup, {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.stat": MEMORY_STAT})
    write(cgroup, {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"})
    assert memory_limit(cgroup, proc) == 6000
    assert cpu_quota(cgroup, proc) == 2.5  # the container's own group is the mount; /docker/x is not to be seen in it
    (cgroup / "memory/docker/x/memory.limit_in_bytes").write_text("9223372036854771712")
    (cgroup / "cpu/cpu.cfs_quota_us").write_text("-1")
    assert memory_limit(cgroup, proc) is None and cpu_quota(cgroup, proc) is None


def test_a_limit_of_version_1_bounds_what_dsr1_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    write(tmp_path, {"memory/memory.limit_in_bytes": str(2 * GIB), "memory/memory.stat": MEMORY_STAT})
    assert 0 < hardware.usable_ram() <= GIB  # of less than the reserve, half


def test_speeds_that_were_kept_are_told_with_their_date(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load_machine("epyc-9355")
    monkeypatch.setattr("offload.checks.speeds.measured_machine", lambda: None)
    assert "--measure" in found(kept_speeds()).value
    monkeypatch.setattr("offload.checks.speeds.measured_machine", lambda: replace(machine, date="2026-02-03"))
    told = found(kept_speeds()).value
    assert (
        told.startswith("of 2026-02-03: memory 522.2 GB/s") and "RTX 4090 (sm 8.9): 1,008 GB/s, PCIe 25 there" in told
    )


def test_a_machine_that_tells_nothing_is_examined_all_the_same(tmp_path: Path) -> None:
    names = [found(check).name for check in examine(tmp_path)]
    assert len(set(names)) == len(names)
    assert {"RAM", "GPU", "packages", "kernel cache"} <= set(names)
    assert not {"AMX", "NUMA nodes", "huge pages", "swap", "overcommit"} & set(names)


def test_the_command_prints_all_checks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("RAM", "much [of it]"), Check("swap", "x" * 100, "attention", "do this")]
    monkeypatch.setattr(command, "examine", lambda measure, model: checks)
    assert command.doctor()
    with pytest.raises(UsageError, match="--measure nano-r1"):
        command.doctor(model="nano-r1")
    with pytest.raises(CheckpointError):
        command.doctor(measure=True, model="no-such-model")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["ok         RAM   much [of it]", f"attention  swap  {'x' * 100}", "                 -> do this"]
    assert command.doctor(as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "attention"
    assert told["checks"][1] == {"name": "swap", "value": "x" * 100, "verdict": "attention", "remedy": "do this"}
    checks.append(Check("Python", "32 bits", "problem", "another one"))
    assert not command.doctor(as_json=True)


def test_this_machine_without_torch_and_numba() -> None:
    code = (
        "import json, sys\n"
        "from cli.doctor import doctor\n"
        "doctor(as_json=True)\n"
        "heavy = {'torch', 'numba', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert {check["name"] for check in json.loads(done.stdout)["checks"]} >= {"system", "cores", "models at 4 bits"}

"""How fast a checkpoint of R1's sizes is converted, in how much memory, beside llama.cpp's own quantiser.

    python -m benchmarks.quantize --data DIR [--recipes fast,accurate] [--experts 200] [--limit 2.5G] [--json FILE]

dsr1 converts 20 GB of FP8 (benchmarks/synthetic_checkpoint.py); each shard is deleted when it is converted, as one that
was downloaded would be, so that DIR needs little more than 20 GB. llama.cpp quantises an F16 file of tensors of the
same widths. Private memory (RssAnon) is looked at 50 times a second. --limit also runs dsr1 in a memory cgroup.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environments import LLAMA, default_folder, environment
from benchmarks.synthetic_checkpoint import r1_fields, write_checkpoint
from cli.escape import say
from offload.hardware import allowed_cores
from offload.sizes import parse_size
from quant.checkpoint import INDEX_NAME
from quant.errors import Dsr1Error

CGROUPS = Path("/sys/fs/cgroup")
SHARD_BYTES = int(4.3e9)
LLAMA_TYPES = ("Q4_0", "Q4_K")
EXPERTS_OF_LLAMA = 16
CONVERT = """
import json, sys, time
from pathlib import Path
from hybrid_rt.engine import use_threads
from quant.checkpoint import Checkpoint
from quant.convert import Source, convert
from quant.kernels.ahead import ENCODING_KERNELS, compile_ahead
from quant.kernels.widen import widen
from quant.shards import Shards

class Passing(Shards):
    def drop(self, path):
        path.unlink()

use_threads(None)
compile_ahead([*ENCODING_KERNELS, widen])
checkpoint = Checkpoint.open(sys.argv[1])
begin, cpu = time.perf_counter(), time.process_time()
source = Source(checkpoint, Passing(), "a benchmark's")
manifest = convert(source, Path(sys.argv[2]), sys.argv[3])
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
stored = sum(file.nbytes for file in manifest.files.values())
weights = sum(spec.parameters for spec in checkpoint.inventory.tensors)
sizes = {"weights": weights, "source_bytes": checkpoint.nbytes, "store_bytes": stored}
print(json.dumps({"seconds": seconds, "cpu_s": cpu, **sizes}))
"""


def run_watched(command: list[str], prepare: Callable[[], None] | None = None) -> dict[str, Any]:
    """What a command prints last, a JSON object, and its peak of private memory in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=prepare)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _private_bytes(process.pid))
        time.sleep(0.02)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    if process.returncode:
        raise Dsr1Error(f"{' '.join(command[:3])} ended with {process.returncode}; what it says stands above")
    return {**json.loads(lines[-1]), "peak_private_bytes": peak}


def _private_bytes(process: int) -> int:
    """RssAnon: pages that belong to no file."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A cgroup, of version 1 or 2, whose processes may use `limit` bytes. Raises Dsr1Error where none can be made."""
    parent = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS
    group = parent / f"dsr1-benchmark-{os.getpid()}"
    try:
        group.mkdir()
        name = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
        (group / name).write_text(str(limit))
    except OSError as error:
        raise Dsr1Error(
            f"no memory cgroup can be made in {parent} ({error.strerror}); run as root, or without --limit"
        ) from None
    try:
        yield group
    finally:
        group.rmdir()


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def convert_once(data: Path, recipe: str, experts: int, limit: int | None) -> dict[str, Any]:
    """Make the checkpoint, if it is not there, convert it and delete both."""
    source, store = data / "checkpoint", data / "store"
    shutil.rmtree(store, ignore_errors=True)
    if not (source / INDEX_NAME).exists():  # which is written last
        say(f"writing a checkpoint with {experts} experts a layer")
        write_checkpoint(source, r1_fields(experts, 2), SHARD_BYTES)
    command = [sys.executable, "-c", CONVERT, str(source), str(store), recipe]
    try:
        if limit is None:
            found = run_watched(command)
        else:
            with memory_cgroup(limit) as group:
                found = run_watched(command, partial(_enter, group))
    finally:
        shutil.rmtree(store, ignore_errors=True)
        shutil.rmtree(source, ignore_errors=True)
    return {"who": "dsr1", "what": recipe, "limit": limit, **found}


def quantise_with_llama(data: Path, envs: Path, kind: str) -> dict[str, Any]:
    """llama.cpp's quantiser on an F16 file, which has two bytes where FP8 has one."""
    python = environment(LLAMA, envs).python
    command = [python, "-m", "benchmarks.llama_quantize", str(data), kind, str(EXPERTS_OF_LLAMA), str(allowed_cores())]
    return {"who": LLAMA.name, "what": kind, "limit": None, **run_watched(command)}


def row(found: dict[str, Any], cores: int) -> str:
    """A line of the table: weights, not bytes, are what both sides have in common."""
    weights = found["weights"]
    limit = "" if found["limit"] is None else f"{found['limit'] / 2**30:.1f} GiB"
    per_core, per_cpu = (weights / 1e6 / seconds for seconds in (found["seconds"] * cores, found["cpu_s"]))
    peak = f"{found['peak_private_bytes'] / 2**20:,.0f} MiB"
    return (
        f"| {found['who']} | {found['what']} | {limit} | {found['source_bytes'] / 1e9:.1f} | {found['seconds']:.1f} "
        f"| {per_core:.0f} | {per_cpu:.0f} | {peak} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="needs 22 GB of disk")
    parser.add_argument("--recipes", default="fast,accurate")
    parser.add_argument("--experts", type=int, default=200, help="a layer; 200 make 20 GB")
    parser.add_argument("--limit", metavar="SIZE", help="also run each recipe in a memory cgroup of this size")
    parser.add_argument("--types", default=",".join(LLAMA_TYPES), help="of llama.cpp; empty to leave it out")
    parser.add_argument("--envs", type=Path, default=default_folder())
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    limits = [None] if told.limit is None else [None, parse_size(told.limit)]
    found = [
        convert_once(told.data, recipe, told.experts, limit)
        for recipe in filter(None, told.recipes.split(","))
        for limit in limits
    ]
    found += [quantise_with_llama(told.data, told.envs, kind) for kind in filter(None, told.types.split(","))]
    if told.json:
        told.json.write_text(json.dumps(found, indent=2))
    print("| who | what | limit | GB read | seconds | M weights/s a core | M weights/s a CPU second | private memory |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for one in found:
        print(row(one, allowed_cores()))


if __name__ == "__main__":
    try:
        main()
    except Dsr1Error as error:
        sys.exit(str(error))

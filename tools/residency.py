"""What each residency of routed experts costs at load and gains in decode, with a file of random experts.

python -m tools.residency --folder DIR [--shape r1 --format accurate --experts 40 --rounds 60]

Written are three files of so many experts, removed afterwards. One is in the page cache in pages of 4 KiB, one as Linux
reads ahead for mapped files, one as it does when huge pages are advised; the last is also copied, then it leaves the
cache. Calls of one token take turns, with experts drawn so that none comes again before all have come.
"""

import argparse
import mmap
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from cli.bench import find_format, find_shape
from hybrid_rt.engine import use_threads
from offload.backend import CpuBackend
from offload.benchmark.draw import ExpertDraw
from offload.benchmark.limits import expert_ranges, fastest_read
from offload.benchmark.measure import Run, Runs, seconds_of
from offload.benchmark.weights import random_records
from offload.experts import CpuExperts, ExpertBuffers, PackedExperts
from offload.memory import lock
from offload.node_experts import NodeExperts, copy_records
from offload.sizes import format_size
from offload.topology import read_topology
from quant.config import ModelConfig
from quant.files import let_go
from quant.packed import ExpertRecord
from quant.safetensors_file import FileSpan

PAGE = mmap.PAGESIZE
READ_BYTES = 1 << 20
LOADS = 3


@dataclass(frozen=True)
class Setup:
    """A layer's shape and how many of its experts are there."""

    config: ModelConfig
    record: ExpertRecord
    experts: int

    @property
    def nbytes(self) -> int:
        return self.experts * self.record.nbytes


def write_experts(setup: Setup, path: Path) -> FileSpan:
    """A file of random records, on the disk and not in the page cache."""
    records = random_records(setup.record, setup.experts, seed=0)
    with path.open("wb") as file:
        for expert in records:
            file.write(expert.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    drop(path)
    return FileSpan(path, 0, setup.nbytes)


def drop(path: Path) -> None:
    """Let a file leave the page cache."""
    with path.open("rb") as file:
        let_go(file.fileno(), 0, path.stat().st_size)


def cache_in_small_pages(path: Path) -> None:
    """Read a file without readahead, a page at a time."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        buffer = memoryview(bytearray(PAGE))
        while file.readinto(buffer):
            pass


def read_whole(path: Path) -> None:
    """Bring a file into the page cache as programs usually do."""
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(READ_BYTES))
        while file.readinto(buffer):
            pass


def mapped(setup: Setup, path: Path, huge: bool = False) -> PackedExperts:
    """The experts in a mapped file."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if huge:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    records = torch.frombuffer(mapping, dtype=torch.uint8).view(setup.experts, setup.record.nbytes)
    return PackedExperts(records, setup.record)


def touch(experts: PackedExperts) -> None:
    """Read a byte of every page, in order."""
    experts.records.view(-1)[::PAGE].sum()


def locked(setup: Setup, path: Path) -> PackedExperts:
    """The experts in a mapped and locked file."""
    experts = mapped(setup, path)
    lock(experts.records)
    return experts


def load_times(setup: Setup, span: FileSpan) -> None:
    """Print how long each way of loading takes, from the disk and from the page cache: medians."""
    topology = read_topology()
    ways: dict[str, Callable[[], object]] = {
        "mapped, all pages touched": lambda: touch(mapped(setup, span.path)),
        "mapped, huge pages advised": lambda: touch(mapped(setup, span.path, huge=True)),
        "locked": lambda: locked(setup, span.path),
        "copied": lambda: copy_records(span, setup.record, topology, []),
    }
    for name, way in ways.items():
        colds, warms = [], []
        for _ in range(LOADS):
            drop(span.path)
            colds.append(seconds_of(way))
            read_whole(span.path)
            warms.append(seconds_of(way))
        cold, warm = median(colds), median(warms)
        speeds = f"{span.nbytes / cold / 1e9:.2f} and {span.nbytes / warm / 1e9:.2f} GB/s"
        print(f"{name:28} {cold:6.2f} s from disk, {warm:6.2f} s from the page cache: {speeds}", flush=True)


def decode_times(setup: Setup, kinds: dict[str, PackedExperts | NodeExperts], rounds: int) -> dict[str, Runs]:
    """One token's experts from each kind of memory in turns; every kind gets the same draws."""
    backend = CpuBackend()
    buffers = ExpertBuffers(setup.config, backend, 1)
    layers = {name: CpuExperts(experts, backend, buffers) for name, experts in kinds.items()}
    draw = ExpertDraw(setup.experts, setup.config.n_activated_experts, seed=0)
    x, weights = torch.randn(1, setup.config.dim).bfloat16(), torch.full((1, draw.top_k), 1 / draw.top_k)
    runs: dict[str, list[Run]] = {name: [] for name in kinds}
    for _ in range(rounds):
        ids = torch.from_numpy(draw.draw(1))
        for name, layer in layers.items():
            seconds = seconds_of(lambda layer=layer, ids=ids: call(layer, x, ids, weights))  # type: ignore[misc]
            runs[name].append(Run(seconds, draw.top_k * setup.record.nbytes))
    warm = setup.experts // draw.top_k  # every expert once
    return {name: Runs(tuple(of_kind[warm:])) for name, of_kind in runs.items()}


def call(layer: CpuExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return layer.sync(layer.submit(x, ids, weights))


def measure(setup: Setup, folder: Path, rounds: int) -> None:
    """Print all figures."""
    spans = [write_experts(setup, folder / f"{name}.bin") for name in ("small", "ahead", "huge")]
    load_times(setup, spans[0])
    for span in spans:
        drop(span.path)
    kinds: dict[str, PackedExperts | NodeExperts] = {
        "copied": copy_records(spans[2], setup.record, read_topology(), [])
    }
    cache_in_small_pages(spans[0].path)
    for name, span, huge in zip(
        ("mapped, 4 KiB pages", "mapped, readahead", "mapped, huge pages advised"),
        spans,
        (False, False, True),
        strict=True,
    ):
        kinds[name] = experts = mapped(setup, span.path, huge)
        touch(experts)
    found = decode_times(setup, kinds, rounds)
    copied = found["copied"].seconds
    for name, runs in found.items():
        low, high = (1e3 * seconds for seconds in runs.seconds_quartiles)
        speed = f"{runs.bytes_s / 1e9:.1f} GB/s, {runs.seconds / copied:.3f} of copied"
        print(f"{name:28} {1e3 * runs.seconds:6.2f} ms a token's experts ({low:.2f}-{high:.2f}), {speed}")
    layer = CpuExperts(kinds["copied"], CpuBackend(), ExpertBuffers(setup.config, CpuBackend(), 1))
    _, read = fastest_read(expert_ranges([layer], setup.nbytes))
    print(f"{'copied, read plainly':28} {read.bytes_s / 1e9:.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; needs room for three files")
    parser.add_argument("--shape", default="r1")
    parser.add_argument("--format", default="accurate")
    parser.add_argument("--experts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    config = find_shape(arguments.shape)
    record = ExpertRecord(find_format(arguments.format), config.dim, config.moe_inter_dim)
    setup = Setup(config, record, arguments.experts)
    print(f"{setup.experts} experts of {arguments.shape} as {arguments.format}, {format_size(setup.nbytes)} a file")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder)))
        measure(setup, folder, arguments.rounds)


if __name__ == "__main__":
    main()

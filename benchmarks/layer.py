"""One MoE layer of DeepSeek-R1's shape: dsr1 beside kt-kernel, in turns. docs/benchmarks.md says what is measured.

python -m benchmarks.layer [--methods AMXINT4,RAWINT4] [--formats fast] [--threads 1,2] [--tokens 1,512] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.environments import KT, Environment, default_folder, describe, environment
from benchmarks.layer_setup import METHODS, Method, Setup, r1_config
from benchmarks.rounds import Measured, measure
from benchmarks.tables import machine, machine_line, markdown_table, parse_names, with_quartiles, write_json
from benchmarks.workers import ROOT, Worker
from cli.bench import parse_tokens
from cli.escape import say
from offload.benchmark.measure import Effort
from offload.benchmark.report import plural
from offload.sizes import format_size
from quant.errors import Dsr1Error
from quant.packed import PACKED_FORMATS, ExpertRecord, PackedFormat

TOKENS = "1,2,4,8,16,128,129,512,2048"
SPARE_BYTES = 2 * 2**30  # for what else both programs hold
HEADS = (
    "kt-kernel",
    "dsr1",
    "threads",
    "tokens",
    "kt-kernel ms",
    "dsr1 ms",
    "times as fast",
    "read GB/s",
    "of floor",
    "others",
)


@dataclass(frozen=True)
class Row:
    """One number of tokens, with kt-kernel, dsr1 and plain reading in turns."""

    method: str
    format: str
    setup: Setup
    tokens: int
    measured: Measured

    @property
    def floor_share(self) -> float:
        """Of the time that reading each touched expert once takes, in dsr1's time."""
        return self.measured.runs["ours"].bytes_s / self.measured.runs["read"].bytes_s

    def cells(self) -> list[str]:
        """For people."""
        ours, peer, read = (self.measured.runs[kind] for kind in ("ours", "peer", "read"))
        low, ratio, high = self.measured.ratios
        return [
            self.method,
            self.format,
            str(self.setup.threads),
            str(self.tokens),
            with_quartiles(1e3 * peer.seconds, milliseconds(peer.seconds_quartiles)),
            with_quartiles(1e3 * ours.seconds, milliseconds(ours.seconds_quartiles)),
            with_quartiles(ratio, (low, high)),
            f"{read.bytes_s / 1e9:.1f}",
            f"{self.floor_share:.0%}",
            f"{self.measured.foreign:.2f}",
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        low, ratio, high = self.measured.ratios
        return {
            "method": self.method,
            "format": self.format,
            "threads": self.setup.threads,
            "tokens": self.tokens,
            **self.measured.to_json(),
            **{f"{kind}_bytes": runs.nbytes for kind, runs in self.measured.runs.items()},
            "ratio": [ratio, low, high],
            "read_gb_s": self.measured.runs["read"].bytes_s / 1e9,
            "floor_share": self.floor_share,
        }


def milliseconds(seconds: tuple[float, float]) -> tuple[float, float]:
    low, high = seconds
    return 1e3 * low, 1e3 * high


def formats_beside(method: Method, chosen: Sequence[str]) -> list[PackedFormat]:
    """Those of our formats that have as many bits."""
    return [PACKED_FORMATS[name] for name in chosen if PACKED_FORMATS[name].bits == method.bits]


def fits(method: str, fmt: PackedFormat, experts: int, available: int) -> bool:
    """Whether both layers fit into `available` bytes; if not, that is told."""
    config, peer = r1_config(), METHODS[method]
    peer_bytes = peer.layer_bytes(config, experts)
    ours_bytes = experts * ExpertRecord(fmt, config.dim, config.moe_inter_dim).nbytes
    needed = max(peer.copies * peer_bytes, peer_bytes + ours_bytes) + SPARE_BYTES
    if needed > available:
        say(
            f"{method} beside {fmt.name} is left out: it needs {format_size(needed)}, free are {format_size(available)}"
        )
    return needed <= available


class Comparison:
    """The layer of kt-kernel's `method` beside ours, at several numbers of tokens."""

    def __init__(self, kt: Environment, logs: Path, tokens: Sequence[int], effort: Effort) -> None:
        self.kt, self.logs, self.tokens, self.effort = kt, logs, tokens, effort
        self.packed = kt.folder / "packed"

    def pack(self) -> dict[str, float]:
        """Make kt-kernel's quantised experts; their errors by method. Raises Dsr1Error."""
        say("kt-kernel quantises its experts")
        command = [self.kt.python, "-m", "benchmarks.kt_pack", str(self.packed)]
        with (self.logs / "kt_pack.log").open("w") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        if done.returncode:
            raise Dsr1Error(f"kt-kernel cannot quantise experts; {log.name} tells why")
        errors: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return errors

    def rows(self, method: str, formats: Sequence[PackedFormat], setup: Setup) -> Iterator[Row]:
        """kt-kernel loads once, and ours beside it, one format after the other."""
        fitting = [fmt for fmt in formats if fits(method, fmt, setup.experts, psutil.virtual_memory().available)]
        if not fitting:
            return
        say(f"loading {method} with {plural(setup.threads, 'thread')}")
        words = ["benchmarks.kt_layer", method, f"--packed={self.packed}", *setup.words()]
        with closing(Worker(method, [self.kt.python, "-m", *words], self.logs / f"{method}.log")) as peer:
            for fmt in fitting:
                command = [sys.executable, "-m", "benchmarks.ours_layer", fmt.name, *setup.words()]
                with closing(Worker(fmt.name, command, self.logs / f"{fmt.name}.log")) as ours:
                    for tokens in self.tokens:
                        yield Row(method, fmt.name, setup, tokens, self._measure(ours, peer, tokens))

    def _measure(self, ours: Worker, peer: Worker, tokens: int) -> Measured:
        say(f"{peer.name} and {ours.name}: {plural(tokens, 'token')}")
        kinds = {
            "peer": lambda: peer.run(f"run {tokens}"),
            "ours": lambda: ours.run(f"run {tokens}"),
            "read": lambda: ours.run(f"read {tokens}"),
        }
        return measure(kinds, (ours, peer), self.effort)


def our_errors() -> dict[str, float]:
    """mean|difference| / mean|output| by format, from tools/formats/layer_error.py."""
    say("measuring the errors of dsr1's formats")
    command = [sys.executable, "-m", "tools.formats.layer_error", "--experts", "2", "--tokens", "4"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return parse_errors(done.stdout)


def parse_errors(text: str) -> dict[str, float]:
    """From lines like "fast: 0.139"."""
    pairs = (line.split(": ") for line in text.splitlines())
    return {name: float(error) for name, error in pairs}


def error_table(ours: dict[str, float], peers: dict[str, float]) -> str:
    """Both sides' errors in one table."""
    rows = [[f"dsr1 {name}", f"{error:.3f}"] for name, error in ours.items()]
    rows += [[f"kt-kernel {name}", f"{error:.3f}"] for name, error in peers.items()]
    return markdown_table(("format", "error of the layer"), rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--formats", default=",".join(PACKED_FORMATS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--experts", type=int, default=r1_config().n_routed_experts, help="fewer are for a quick try")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each number of tokens, all kinds together")
    parser.add_argument("--no-errors", action="store_true", help="leave the table of errors out")
    parser.add_argument("--envs", type=Path, default=default_folder(), help="folder of the peers' environments")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    told = parse_arguments()
    methods, formats = parse_names(told.methods, list(METHODS)), parse_names(told.formats, list(PACKED_FORMATS))
    tokens, threads = parse_tokens("--tokens", told.tokens), parse_tokens("--threads", told.threads)
    kt = environment(KT, told.envs)
    comparison = Comparison(kt, told.envs, tokens, Effort(told.seconds, least=5))
    peer_errors = comparison.pack()
    fields: dict[str, Any] = {"machine": machine(), "peers": describe([kt]), "experts": told.experts}
    print(f"{machine_line(fields['machine'])}. {kt.label} ({kt.system}). {told.experts} experts.\n")
    if not told.no_errors:
        fields["errors"] = {"ours": our_errors(), "kt-kernel": peer_errors}
        print(error_table(*fields["errors"].values()) + "\n")
    rows: list[Row] = []
    for count in threads:
        for method in methods:
            setup = Setup(count, told.experts, max(tokens))
            rows += comparison.rows(method, formats_beside(METHODS[method], formats), setup)
            write_json(told.json, {**fields, "rows": [row.to_json() for row in rows]})  # an hour's work, so far
    print(markdown_table(HEADS, [row.cells() for row in rows]))


if __name__ == "__main__":
    try:
        main()
    except Dsr1Error as error:
        sys.exit(str(error))

"""A model of Moonlight-16B's shape with random weights, on the CPU: dsr1 beside llama.cpp, in turns.

python -m benchmarks.model --data DIR [--types Q4_0,Q4_K_M] [--formats fast] [--threads 1,2] [--json FILE]

The model's files, 9 to 11 GB each, are made in DIR when they are not there. docs/benchmarks.md says what is measured.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import LLAMA, Environment, default_folder, describe, environment
from benchmarks.model_setup import shape_fields
from benchmarks.random_store import write_store
from benchmarks.rounds import Measured, measure
from benchmarks.tables import machine, machine_line, markdown_table, parse_names, with_quartiles, write_json
from benchmarks.workers import ROOT, Worker
from cli.bench import NEW_TOKENS, PREFILL_TOKENS, PROMPT_TOKENS, parse_tokens
from cli.escape import say
from offload.benchmark.measure import Effort, Run
from offload.benchmark.report import plural
from quant.errors import Dsr1Error
from quant.packed import PACKED_FORMATS
from quant.store import is_store

TYPES = ("Q4_0", "Q4_K_M", "Q8_0")
REPACK = {"yes": True, "no": False}
# What is asked of both sides, and the tokens of it.
WORK = {
    "prefill": (f"prefill {PREFILL_TOKENS}", PREFILL_TOKENS),
    "decode": (f"decode {PROMPT_TOKENS} {NEW_TOKENS}", NEW_TOKENS),
}
HEADS = (
    "llama.cpp",
    "repacked",
    "dsr1",
    "threads",
    "work",
    "llama.cpp tok/s",
    "dsr1 tok/s",
    "times as fast",
    "read GB/s",
    "of read",
    "others",
)


@dataclass(frozen=True)
class Setup:
    """One of llama.cpp's ways beside one of ours."""

    type: str
    repack: bool
    format: str
    threads: int


@dataclass(frozen=True)
class Row:
    """Prefill or decoding, with llama.cpp, dsr1 and plain reading in turns."""

    setup: Setup
    work: str
    measured: Measured

    @property
    def read_share(self) -> float | None:
        """Of the read bandwidth, what dsr1's decoding reads of weights; prefill is not bound to it."""
        ours, read = self.measured.runs["ours"], self.measured.runs["read"]
        return ours.bytes_s / read.bytes_s if ours.nbytes else None

    def tokens_s(self, kind: str) -> tuple[float, float, float]:
        """Tokens a second: the median, lower and upper quartile."""
        tokens, runs = WORK[self.work][1], self.measured.runs[kind]
        fast, slow = runs.seconds_quartiles
        return tokens / runs.seconds, tokens / slow, tokens / fast

    def cells(self) -> list[str]:
        """For people."""
        low, ratio, high = self.measured.ratios
        share = self.read_share
        return [
            self.setup.type,
            "yes" if self.setup.repack else "no",
            self.setup.format,
            str(self.setup.threads),
            self.work,
            *(
                with_quartiles(median, (lower, upper), ".1f")
                for median, lower, upper in map(self.tokens_s, ("peer", "ours"))
            ),
            with_quartiles(ratio, (low, high)),
            f"{self.measured.runs['read'].bytes_s / 1e9:.1f}",
            "" if share is None else f"{share:.0%}",
            f"{self.measured.foreign:.2f}",
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        low, ratio, high = self.measured.ratios
        return {
            "type": self.setup.type,
            "repack": self.setup.repack,
            "format": self.setup.format,
            "threads": self.setup.threads,
            "work": self.work,
            **self.measured.to_json(),
            **{f"{kind}_tok_s": self.tokens_s(kind) for kind in ("peer", "ours")},
            "ratio": [ratio, low, high],
            "read_gb_s": self.measured.runs["read"].bytes_s / 1e9,
            "read_share": self.read_share,
        }


class Models:
    """The files of one shape in a folder, made when they are first asked for. routed: with fewer experts."""

    def __init__(self, folder: Path, llama: Environment, routed: int | None) -> None:
        self.folder, self.llama, self.routed = folder, llama, routed
        self._prefix = "moonlight" if routed is None else f"moonlight-{routed}"

    def store(self, name: str) -> Path:
        """Ours, every matrix in one format."""
        path, fmt = self.folder / f"{self._prefix}-{name}", PACKED_FORMATS[name]
        if not is_store(path):
            say(f"writing {path}")
            write_store(path, shape_fields("moonlight", self.routed), fmt, fmt)
        return path

    def gguf(self, kind: str) -> Path:
        """llama.cpp's. Raises Dsr1Error when it cannot be written."""
        path = self.folder / f"{self._prefix}-{kind}.gguf"
        if path.exists():
            return path
        say(f"writing {path}")
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [self.llama.python, "-m", "benchmarks.random_gguf", str(path), kind]
        fewer = [] if self.routed is None else [f"--routed={self.routed}"]
        if subprocess.run([*command, *fewer], cwd=ROOT, stdout=sys.stderr).returncode:
            raise Dsr1Error(f"{path} cannot be written, what stands above tells why")
        return path


def compare(models: Models, setup: Setup, logs: Path, effort: Effort) -> Iterator[Row]:
    """Load both sides and measure them."""
    file, folder = models.gguf(setup.type), models.store(setup.format)
    label = f"{setup.type}{'' if setup.repack else ' as it is'} and {setup.format}, {plural(setup.threads, 'thread')}"
    say(f"loading {label}")
    words = [
        "benchmarks.llama_model",
        str(file),
        f"--threads={setup.threads}",
        *([] if setup.repack else ["--no-repack"]),
    ]
    with closing(Worker(setup.type, [models.llama.python, "-m", *words], logs / f"{setup.type}.log")) as peer:
        command = [sys.executable, "-m", "benchmarks.ours_model", str(folder), f"--threads={setup.threads}"]
        with closing(Worker(setup.format, command, logs / f"{setup.format}.log")) as ours:
            for work, (asked, _) in WORK.items():
                say(f"{label}: {asked}")
                yield Row(setup, work, measure(kinds_of(peer, ours, asked), (ours, peer), effort))


def kinds_of(peer: Worker, ours: Worker, asked: str) -> dict[str, Callable[[], Run]]:
    """What takes turns."""
    return {"peer": lambda: peer.run(asked), "ours": lambda: ours.run(asked), "read": lambda: ours.run("read")}


def setups(told: argparse.Namespace) -> list[Setup]:
    """All that were asked for. Raises Dsr1Error for an unknown name."""
    types, formats = parse_names(told.types, TYPES), parse_names(told.formats, list(PACKED_FORMATS))
    repacks = parse_names(told.repack, list(REPACK))
    return [
        Setup(kind, REPACK[repack], name, threads)
        for threads in parse_tokens("--threads", told.threads)
        for kind in types
        for repack in repacks
        for name in formats
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the models' files")
    parser.add_argument("--types", default="Q4_0,Q4_K_M", help="llama.cpp's")
    parser.add_argument("--repack", default="yes,no", help="whether llama.cpp lays weights out anew when it loads them")
    parser.add_argument("--formats", default="fast", help="ours, for all matrices")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--routed", type=int, help="fewer routed experts than the shape has, for a quick try")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each kind of work, both sides together")
    parser.add_argument("--envs", type=Path, default=default_folder(), help="folder of the peers' environments")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    told = parse_arguments()
    wanted: Sequence[Setup] = setups(told)
    llama = environment(LLAMA, told.envs)
    models, effort = Models(told.data, llama, told.routed), Effort(told.seconds, least=5)
    fields: dict[str, Any] = {"machine": machine(), "peers": describe([llama]), "routed": told.routed}
    print(f"{machine_line(fields['machine'])}. {llama.label} ({llama.system}).\n")
    rows: list[Row] = []
    for setup in wanted:
        rows += compare(models, setup, told.envs, effort)
        write_json(told.json, {**fields, "rows": [row.to_json() for row in rows]})  # an hour's work, so far
    print(markdown_table(HEADS, [row.cells() for row in rows]))


if __name__ == "__main__":
    try:
        main()
    except Dsr1Error as error:
        sys.exit(str(error))

"""The read bandwidth that all shares are of, beside what two programs of others find: stress-ng and mbw.

python -m benchmarks.bandwidth [--threads 1,2] [--gib 4]

Both are Debian packages: apt-get install stress-ng mbw. stress-ng (memrate) has several ways of reading, of which the
fastest counts, and reads with one process for each thread. mbw copies, on one thread: each byte is read and written.
"""

import argparse
import re
import shutil
import subprocess
import sys

import torch

from benchmarks.tables import machine, machine_line, markdown_table
from cli.bench import parse_tokens
from cli.escape import say
from hybrid_rt.engine import use_threads
from offload.benchmark.limits import fastest_read
from offload.memory import huge_memory
from quant.errors import Dsr1Error
from quant.kernels.bandwidth import PAGE

MIB, GIB = 2**20, 2**30
STRESS_SECONDS = 30
RANGE_BYTES = 2**24  # of each piece that is read at once
READ_LINE = re.compile(r"memrate +([\d.]+) (read\w+) MB per sec")
COPY_LINE = re.compile(r"^AVG.*Copy: ([\d.]+) MiB/s", re.MULTILINE)


def our_rate(threads: int, nbytes: int) -> float:
    """Bytes a second of the fastest of our ways, as in `dsr1 bench`."""
    use_threads(threads)
    memory = huge_memory(nbytes)
    memory.fill_(1)  # pages that were never written are one page of zeros
    starts = range(memory.data_ptr(), memory.data_ptr() + nbytes, RANGE_BYTES)
    _, runs = fastest_read(torch.tensor([(start, RANGE_BYTES // PAGE) for start in starts]))
    return runs.bytes_s


def stress_rate(threads: int, nbytes: int) -> float:
    """Bytes a second of stress-ng's processes together. Raises Dsr1Error."""
    words = ["--memrate", str(threads), "--memrate-bytes", str(nbytes // threads), "--timeout", str(STRESS_SECONDS)]
    return threads * fastest_of_stress(run_tool("stress-ng", *words, "--metrics"))


def copy_rate(nbytes: int) -> float:
    """Bytes a second that mbw reads and writes, one thread. Raises Dsr1Error."""
    found = COPY_LINE.search(run_tool("mbw", "-t0", "-n", "5", str(nbytes // MIB)))
    if found is None:
        raise Dsr1Error("mbw prints no average that this script understands; take Debian's mbw 1.2 or newer")
    return 2 * MIB * float(found[1])


def fastest_of_stress(text: str) -> float:
    """Bytes a second of one process, in its fastest way of reading. Raises Dsr1Error if it tells none."""
    rates = [float(rate) for rate, _ in READ_LINE.findall(text)]
    if not rates:
        raise Dsr1Error("stress-ng did not come to reading; run it while nothing else runs, or give a smaller --gib")
    return MIB * max(rates)


def run_tool(name: str, *words: str) -> str:
    """All that a tool prints. Raises Dsr1Error when it is missing or fails."""
    if shutil.which(name) is None:
        raise Dsr1Error(f"{name} is not installed; on Debian, `apt-get install {name}` brings it")
    say(f"running {name}")
    done = subprocess.run([name, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Dsr1Error(f"{name} ended with status {done.returncode}: {done.stdout[-500:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--gib", type=int, default=4, help="memory to read, many times the last-level cache")
    told = parser.parse_args()
    nbytes = told.gib * GIB
    rows: list[list[str]] = []
    for threads in parse_tokens("--threads", told.threads):
        for name, rate in (("dsr1", our_rate), ("stress-ng memrate", stress_rate), ("dsr1 again", our_rate)):
            rows.append([name, str(threads), f"{rate(threads, nbytes) / 1e9:.1f}"])
    rows.append(["mbw, reading and writing", "1", f"{copy_rate(nbytes // 2) / 1e9:.1f}"])
    print(machine_line(machine()) + "\n")
    print(markdown_table(("read by", "threads", "GB/s"), rows))


if __name__ == "__main__":
    try:
        main()
    except Dsr1Error as error:
        sys.exit(str(error))

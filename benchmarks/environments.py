"""The peers' virtual environments: made once, outside of this repository, and used again.

python -m benchmarks.environments [llama-cpp] [kt-kernel] [--envs DIR]

llama.cpp is compiled here, for this processor and with AMX off: with AMX it aborts on DeepSeek's graphs. That needs a
C++ compiler and takes many minutes; kt-kernel brings its kernels, and some gigabytes of torch.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tables import parse_names
from cli.escape import say
from quant.errors import Dsr1Error
from quant.user_cache import user_cache

# GGML_NATIVE asks the compiler for all that this processor has; only flags take AMX away from that again.
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
LLAMA_BUILD = f'-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS="{NO_AMX}" -DCMAKE_CXX_FLAGS="{NO_AMX}"'
LLAMA_PROBE = "import llama_cpp as peer; version = peer.__version__; system = peer.llama_print_system_info().decode()"
KT_PROBE = (
    "from importlib.metadata import version as of; import torch; from kt_kernel import kt_kernel_ext;"
    "version = of('kt-kernel'); system = 'torch ' + torch.__version__"
)


@dataclass(frozen=True)
class Peer:
    """A program to measure beside, in the one version that the scripts are written for.

    probe: Python that sets `version`, and `system`, which tells how it was built. build: environment variables for
    pip. unwanted: what must not stand in `system`.
    """

    name: str
    version: str
    requirements: tuple[str, ...]
    probe: str
    build: Mapping[str, str] = field(default_factory=dict)
    unwanted: str | None = None


@dataclass(frozen=True)
class Environment:
    """A peer that is installed. system: what it says of itself."""

    peer: Peer
    folder: Path
    system: str

    @property
    def python(self) -> str:
        return str(_python(self.folder))

    @property
    def label(self) -> str:
        """Name and version."""
        return f"{self.peer.name} {self.peer.version}"


LLAMA = Peer(
    "llama-cpp",
    "0.3.36",
    ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
    LLAMA_PROBE,
    {"CMAKE_ARGS": LLAMA_BUILD},
    unwanted="AMX_INT8 = 1",
)
KT = Peer("kt-kernel", "0.7.2", ("kt-kernel==0.7.2",), KT_PROBE)
PEERS = {peer.name: peer for peer in (LLAMA, KT)}


def default_folder() -> Path:
    """Where environments are kept, if nobody says otherwise."""
    return user_cache() / "benchmarks"


def environment(peer: Peer, envs: Path) -> Environment:
    """The peer's environment in `envs`, made if it is not there. Raises Dsr1Error when it cannot be made."""
    folder = envs / f"{peer.name}-{peer.version}"
    system = _probe(peer, folder)
    if system is None:
        say(f"installing {peer.name} {peer.version} into {folder}; this can take many minutes")
        _install(peer, folder)
        system = _probe(peer, folder)
    if system is None:
        raise Dsr1Error(
            f"{folder} does not work as {peer.name} {peer.version}: it cannot be imported, is of another version or "
            f"was built otherwise; remove the folder and try again"
        )
    return Environment(peer, folder, system)


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _probe(peer: Peer, folder: Path) -> str | None:
    """What an installed peer says of its build; None if it is missing, or not as it should be."""
    if not _python(folder).exists():
        return None
    code = f"{peer.probe}\nimport json; print(); print(json.dumps([version, system]))"
    done = subprocess.run([_python(folder), "-c", code], capture_output=True, text=True)
    if done.returncode:
        return None
    version, system = json.loads(done.stdout.splitlines()[-1])
    wanted = version == peer.version and (peer.unwanted is None or peer.unwanted not in system)
    return str(system) if wanted else None


def _install(peer: Peer, folder: Path) -> None:
    venv.create(folder, with_pip=True, clear=True)
    command = [str(_python(folder)), "-m", "pip", "install", "--no-cache-dir", *peer.requirements]
    done = subprocess.run(command, env={**os.environ, **peer.build}, stdout=sys.stderr)
    if done.returncode:
        raise Dsr1Error(
            f"{peer.name} {peer.version} cannot be installed, pip tells why above; it needs a network and, for "
            "llama-cpp, a C++ compiler"
        )


def describe(environments: list[Environment]) -> dict[str, Any]:
    """Versions and builds, by name."""
    return {one.peer.name: {"version": one.peer.version, "system": one.system} for one in environments}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"{' or '.join(PEERS)}; by default both")
    parser.add_argument("--envs", type=Path, default=default_folder())
    arguments = parser.parse_args()
    for name in parse_names(",".join(arguments.peers), list(PEERS)) or PEERS:
        one = environment(PEERS[name], arguments.envs)
        print(f"{one.label} in {one.folder}: {one.system}")


if __name__ == "__main__":
    try:
        main()
    except Dsr1Error as error:
        sys.exit(str(error))

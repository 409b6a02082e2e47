"""The driver's side of workers: programs that hold weights and run only when they are asked to.

While one answers, all others are stopped (SIGSTOP): some peers' threads spin while they wait, and would take the cores
from whoever is measured.
"""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.protocol import MARK
from offload.benchmark.measure import Run
from quant.errors import Dsr1Error

ROOT = Path(__file__).parent.parent
TAIL_LINES = 15  # of a dead worker's log that are told
STOP_SECONDS = 20


class Worker:
    """A running worker, to be closed. `about`: what it said when it was ready."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None):
        """Start it and wait until it is ready. What it prints goes to `log`. Raises Dsr1Error if it dies."""
        self.name, self._log = name, log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
            )
        try:
            self.about = self._reply()
        except BaseException:
            self.close()
            raise
        self._stop()

    def ask(self, command: str) -> dict[str, Any]:
        """Wake it, have it answer, and stop it again. Raises Dsr1Error if it dies."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells it
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        answer = self._reply()
        self._stop()
        return answer

    def run(self, command: str) -> Run:
        """Ask for something that is timed."""
        answer = self.ask(command)
        return Run(answer["seconds"], answer["bytes"])

    def cpu_seconds(self) -> float:
        """Processor time that it has taken so far."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End it, and free its memory."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if line.startswith(MARK)), None)
        if line is None:
            status = self._process.wait()
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
            raise Dsr1Error(
                f"the worker {self.name} ended with status {status}; these are the last lines of {self._log}, which "
                f"may tell why (status -9 means that memory ran out):\n{tail}"
            )
        answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
        return answer

    def _stop(self) -> None:
        """Stop it, and wait until all its threads stand."""
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)

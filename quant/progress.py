"""How far a task over many files is, for whoever shows it."""

from collections.abc import Callable
from dataclasses import dataclass

from quant.files import Report

Steps = Callable[[int, int], None]  # told how many steps of a task are done, of how many


@dataclass(frozen=True)
class Fetching:
    """A file that is being downloaded. done, total: its bytes."""

    file: str
    done: int
    total: int


@dataclass(frozen=True)
class Progress:
    """file, tensor: in work. done, total: bytes over all files. fetching: what is downloaded meanwhile."""

    file: str
    done: int
    total: int
    tensor: str = ""
    fetching: Fetching | None = None


def ignore(step: Progress) -> None:
    """Progress for nobody."""


class Meter:
    """Adds up the bytes of all files and tells `progress`, at the start of each file and after each piece."""

    def __init__(self, total: int, progress: Callable[[Progress], None]) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def of(self, file: str) -> Report:
        """What is to be told of the bytes of one file."""

        def report(nbytes: int) -> None:
            self.done += nbytes
            self.progress(Progress(file, self.done, self.total))

        report(0)
        return report


def untold(done: int, total: int) -> None:
    """Steps that nobody is told of."""

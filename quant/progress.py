"""How far a task over many files is, for whoever shows it."""

from collections.abc import Callable
from dataclasses import dataclass

from quant.files import Report

Steps = Callable[[int, int], None]  # told how many steps of a task are done, of how many
Notes = Callable[[str], None]  # told in words what is being done


@dataclass(frozen=True)
class Fetching:
    """A file that is being downloaded. done, total: its bytes."""

    file: str
    done: int
    total: int


@dataclass(frozen=True)
class Progress:
    """file, tensor: in work. done, total: bytes over all files. fetching: what is downloaded meanwhile.

    note: what the rest waits for, as "calibrating layer 4 of 61: expert 3 of 256".
    """

    file: str
    done: int
    total: int
    tensor: str = ""
    fetching: Fetching | None = None
    note: str = ""


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


def unnoted(note: str) -> None:
    """Notes that nobody reads."""


def untold(done: int, total: int) -> None:
    """Steps that nobody is told of."""

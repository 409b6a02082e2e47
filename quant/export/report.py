"""What an export did, for whoever shows it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Exported:
    """files: names and bytes. encoded, taken: how many weights were encoded anew, and had their codes taken over."""

    files: dict[str, int]
    encoded: int
    taken: int

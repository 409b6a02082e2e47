"""Sizes of memory as people write them."""

import re

from quant.errors import Dsr1Error

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


def parse_size(size: str | int) -> int:
    """Bytes of "24G", "24GB", "24GiB" (all the same: 24 x 2^30, as GPU sellers count), "512M" or a number of bytes.

    Raises Dsr1Error for anything else.
    """
    match = PATTERN.fullmatch(str(size))
    if not match:
        raise Dsr1Error(f"{size!r} is not a size; write it as 24G, 24GiB or 512M")
    return int(float(match[1]) * UNITS[match[2].upper()])


def format_size(count: float) -> str:
    """A number of bytes for people: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"

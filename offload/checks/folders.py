"""The folders of the user's cache: compiled kernels, and models of the Hub."""

import os
import shutil
from pathlib import Path

from offload.checks.check import Check
from offload.sizes import format_size

SMALLEST_MODEL = 32 * 2**30  # bytes; a published model of 16 B parameters takes 30 GiB


def kernel_cache(folder: Path) -> Check:
    """folder: that of all machines' kernels (quant/kernels/cache.py has one for each below it)."""
    if not _writable(folder):
        remedy = "kernels are compiled again at each start; make it writable, or set XDG_CACHE_HOME to a folder that is"
        return Check("kernel cache", f"{folder}: not writable", "attention", remedy)
    files = list(folder.rglob("*.bin"))
    if not files:
        return Check("kernel cache", f"{folder}: empty, so the first run takes some seconds longer")
    nbytes = sum(file.stat().st_size for file in files)
    return Check("kernel cache", f"{folder}: {len(files)} compiled kernels, {format_size(nbytes)}")


def hub_cache(folder: Path, free: int | None = None) -> Check:
    """Where models of the Hub are looked for and downloaded to. free: bytes on its disk, by default what is there."""
    if free is None:
        free = shutil.disk_usage(_nearest(folder)).free
    value = f"{folder}: {format_size(free)} free on its disk"
    if not _writable(folder):
        return Check("Hub cache", f"{value}, not writable", "attention", "set HF_HOME to a folder that is writable")
    if free >= SMALLEST_MODEL:
        return Check("Hub cache", value)
    remedy = (
        "to download a model (DeepSeek-R1 takes 641 GiB, Moonlight-16B-A3B 30 GiB), set HF_HOME to a folder on a "
        "larger disk"
    )
    return Check("Hub cache", value, "attention", remedy)


def hub_cache_folder() -> Path:
    """Where huggingface_hub keeps models, as HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME say."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or in the one that it would be made in."""
    nearest = _nearest(folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _nearest(folder: Path) -> Path:
    """The folder, or the first one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))

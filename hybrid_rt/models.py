"""What a user calls a model, and the folder that it means."""

import re
from pathlib import Path

from quant.errors import CheckpointError

NANO_R1 = Path(__file__).parent / "nano_r1"
BUILT_IN = {"nano-r1": NANO_R1, "nano-r1-fp8": NANO_R1}
DEFAULT_MODEL = "nano-r1"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_model(name: str | Path | None) -> Path:
    """The folder of a model: a folder's path, a built-in name, a Hub id downloaded before, or None for the default.

    Raises CheckpointError when there is no such model.
    """
    if name is None:
        name = DEFAULT_MODEL
    if str(name) in BUILT_IN:
        return BUILT_IN[str(name)]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if HUB_ID.fullmatch(str(name)):
        return _downloaded(str(name))
    raise CheckpointError(
        f"there is no folder {name}, and no built-in model of that name ({', '.join(BUILT_IN)}); "
        "give a model folder or a built-in name"
    )


def _downloaded(hub_id: str) -> Path:
    """The folder of a Hub model in the local Hub cache. Nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError):
        raise CheckpointError(
            f"{hub_id} is neither a folder nor in the local Hub cache; download it with `hf download {hub_id}` "
            "(this version does not download models by itself)"
        ) from None

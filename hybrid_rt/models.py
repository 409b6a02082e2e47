"""What a user calls a model, and the folder that it means."""

from pathlib import Path

from quant.errors import CheckpointError, StoreError
from quant.hub import HUB_ID
from quant.progress import Steps, untold

NANO_R1 = Path(__file__).parent / "nano_r1"
DEFAULT_MODEL = "nano-r1"
CHECKPOINT = "nano-r1-fp8"
BUILT_IN = (DEFAULT_MODEL, CHECKPOINT)


def resolve_model(name: str | Path | None, recipe: str | None, notes: list[str], compiling: Steps = untold) -> Path:
    """The folder of a model: a folder's path, a built-in name, a Hub id downloaded before, or None for the default.

    recipe: of the built-in model's store. What a user should know about the choice is added to `notes`; `compiling` is
    told of the kernels that make the store. Raises
    CheckpointError when there is no such model, StoreError when there is no such recipe.
    """
    if name is None or str(name) == DEFAULT_MODEL:
        return _nano_store(recipe, notes, compiling)
    return resolve_checkpoint(name)


def _nano_store(recipe: str | None, notes: list[str], compiling: Steps) -> Path:
    from hybrid_rt.nano_store import nano_store

    try:
        return nano_store(recipe, compiling)
    except OSError as error:
        if recipe is not None:
            raise StoreError(f"nano-r1's store cannot be made in the cache folder ({error})") from None
        notes.append(f"the cache folder cannot take nano-r1's store ({error}), so its FP8 checkpoint runs")
        return NANO_R1


def resolve_checkpoint(name: str | Path) -> Path:
    """As `resolve_model`, for what reads the published form: "nano-r1" is the shipped checkpoint here."""
    if str(name) in BUILT_IN:
        return NANO_R1
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
            f"{hub_id} is neither a folder nor in the local Hub cache; download it with `hf download {hub_id}`, or "
            f"make a store of it with `dsr1 quantize {hub_id} DST`, which downloads it bit by bit"
        ) from None

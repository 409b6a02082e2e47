"""What a published model holds, told by its config.json and the headers of its safetensors files alone.

Of a folder, or of the Hub: there a few MB are read instead of hundreds of GB. Nothing here needs torch.
"""

import errno
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.config import ModelConfig
from quant.errors import CheckpointError, ConfigError
from quant.inventory import Inventory, TensorSpec
from quant.json_object import parse_json_object
from quant.shapes import Shape, shape_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name

FORMAT_OF_DTYPE = {"F8_E4M3": "fp8_block", "BF16": "bf16", "F32": "f32"}
LENGTH_BYTES, MAX_HEADER_BYTES = 8, 100_000_000
PASSING_STATUS = (408, 425, 429)  # of HTTP errors between 400 and 499, those that pass
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
Dtypes = Mapping[str, str]  # published name -> type, as "BF16"


@dataclass(frozen=True, eq=False)
class Published:
    """A model as it is published: its shape, and the one format of each tensor."""

    shape: Shape
    inventory: Inventory
    dtypes: Dtypes

    def available(self, spec: TensorSpec) -> tuple[str, ...]:
        """Name of the format of a tensor (quant/formats.py). A tensor that only V3 has counts as float32."""
        return (FORMAT_OF_DTYPE[self.dtypes.get(spec.source, "F32")],)


def published_on_hub(hub_id: str) -> Published:
    """Read a model's config.json and headers on the Hub. Raises CheckpointError or ConfigError in a sentence."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url

    with hub_errors(hub_id):
        get_hf_file_metadata(hf_hub_url(hub_id, "config.json"))  # fails at once where a download tries again and again
        config = Path(hf_hub_download(hub_id, "config.json"))
        metadata = HfApi().get_safetensors_metadata(hub_id)
    files = metadata.files_metadata.values()
    dtypes = {name: str(tensor.dtype) for file in files for name, tensor in file.tensors.items()}
    return _published(hub_id, config, dtypes)


def published_in(folder: Path) -> Published:
    """Read the config.json and the headers of a checkpoint folder. Raises CheckpointError or ConfigError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files; download the model's weights")
    dtypes = {name: dtype for file in files for name, dtype in _header_dtypes(file).items()}
    return _published(str(folder), folder / "config.json", dtypes)


def _published(name: str, config_json: Path, dtypes: Dtypes) -> Published:
    try:
        fields = parse_json_object(config_json.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{name} has no config.json, so it is not a model; give another folder or Hub id") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"config.json of {name} cannot be read ({error}); download it again") from None
    try:
        shape = shape_of(fields)
    except ConfigError as error:
        raise ConfigError(f"config.json of {name}: {error}") from None
    config = replace(shape.config, n_mtp_layers=_present_mtp_layers(shape.config, dtypes))
    inventory = Inventory.of(config)
    _check_dtypes(name, inventory, dtypes, shape.runs)
    return Published(replace(shape, config=config), inventory, dtypes)


def _present_mtp_layers(config: ModelConfig, dtypes: Dtypes) -> int:
    """MTP layers of which there are tensors; many conversions leave them out."""
    count = 0
    while count < config.n_mtp_layers and f"model.layers.{config.n_layers + count}.enorm.weight" in dtypes:
        count += 1
    return count


def _check_dtypes(name: str, inventory: Inventory, dtypes: Dtypes, runs: bool) -> None:
    for spec in inventory.tensors:
        dtype = dtypes.get(spec.source)
        if dtype is None and (runs or not spec.name.endswith("gate.bias")):
            raise CheckpointError(
                f"{name} lacks tensor {spec.source!r}, which its config.json asks for; give the model as its makers "
                "published it"
            )
        if dtype is not None and dtype not in FORMAT_OF_DTYPE:
            raise CheckpointError(
                f"{name} stores {spec.source!r} as {dtype}, which this version does not read "
                f"({', '.join(FORMAT_OF_DTYPE)}); give the model as its makers published it"
            )


def _header_dtypes(path: Path) -> Dtypes:
    """Types of the tensors of one safetensors file. What is wrong with the rest shows when it is opened to run."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes")
            entries = parse_json_object(file.read(length))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download this file again") from None
    return {name: _dtype(entry) for name, entry in entries.items() if name != "__metadata__"}


def _dtype(entry: Any) -> str:
    return str(entry.get("dtype")) if isinstance(entry, dict) else json.dumps(entry)[:40]


def is_final(error: BaseException) -> bool:
    """Whether an error of huggingface_hub stays the same however often one asks."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # it did not find it here after it could not look there
        return error.__cause__ is None or is_final(error.__cause__)
    if isinstance(error, (errors.EntryNotFoundError, errors.OfflineModeIsEnabled, CheckpointError)):
        return True
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        return 400 <= status < 500 and status not in PASSING_STATUS
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


@contextmanager
def hub_errors(hub_id: str) -> Iterator[None]:
    """Tell in a sentence what the Hub, or the way to it, refused."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP library beneath, and so its errors, differ by version
        raise CheckpointError(_sentence(hub_id, error)) from None


def _sentence(hub_id: str, error: BaseException) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _sentence(hub_id, error.__cause__)
    for kind, sentence in (
        (errors.GatedRepoError, "is gated; accept its terms on its page on the Hub and log in with `hf auth login`"),
        (errors.RevisionNotFoundError, "has no such revision on the Hub; give a branch, a tag or a commit of it"),
        (errors.NotASafetensorsRepoError, "has no safetensors files; give a model that is published in them"),
        (errors.OfflineModeIsEnabled, "is not in the Hub's cache, and HF_HUB_OFFLINE is set; unset it to download"),
    ):
        if isinstance(error, kind):
            return f"{hub_id} {sentence}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no model {hub_id} on the Hub, or it is private; check the name, or log in with `hf auth login`"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f"{hub_id} has no config.json, so it is not a model that this version knows"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{hub_id} cannot be downloaded ({reason}); free space on that disk, then give the same command again"
    return f"{hub_id} cannot be looked up on the Hub ({reason}); check the network, or give a folder"

"""What a published model holds, told by its config.json and the headers of its safetensors files alone.

Of a folder, or of the Hub: there a few MB are read instead of hundreds of GB. Nothing here needs torch.
"""

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

    with _hub_errors(hub_id):
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


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Tell in a sentence what the Hub, or the way to it, refused."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{hub_id} is gated; accept its terms on its page on the Hub and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no model {hub_id} on the Hub, or it is private; check the name, or log in with `hf auth login`"
        ) from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"{hub_id} has no config.json, so it is not a model that this version knows") from None
    except errors.NotASafetensorsRepoError:
        raise CheckpointError(f"{hub_id} has no safetensors files; give a model that is published in them") from None
    except Exception as error:  # the HTTP library beneath, and so its errors, differ by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{hub_id} cannot be looked up on the Hub ({reason}); check the network, or give a folder"
        ) from None

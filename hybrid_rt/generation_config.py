"""How a model is published to be sampled: generation_config.json."""

import json
from pathlib import Path
from typing import Any

from hybrid_rt.sampling import Sampling
from quant.errors import ConfigError


def load_sampling(folder: Path) -> Sampling:
    """The sampling that the model's publisher recommends; the defaults where the file or a field is missing.

    Raises ConfigError if the file cannot be read or a value is out of range.
    """
    path = folder / "generation_config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return _parse(fields)
    except FileNotFoundError:
        return Sampling()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be used ({error}); download the file again") from None


def _parse(fields: dict[str, Any]) -> Sampling:
    if fields.get("do_sample") is False:
        return Sampling(temperature=0)
    names = ("temperature", "top_p", "top_k", "min_p")
    return Sampling(**{name: fields[name] for name in names if fields.get(name) is not None})

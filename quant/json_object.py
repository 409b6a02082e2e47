"""JSON objects from files that are not trusted: headers of safetensors files, indices, manifests."""

import json
from collections import Counter
from typing import Any


def parse_json_object(text: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises ValueError for anything else, also for a key that stands twice."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if type(value) is not dict:
        raise ValueError("it is not a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} stands twice")
    return fields

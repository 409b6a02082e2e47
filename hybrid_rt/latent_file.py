"""A file of cached tokens: their ids and what each left in the latent cache, tied to a model, with a checksum.

A safetensors file. Tensors: `tokens` int64 [T], and the cache's own, [layers, T, ...] each, under the names that it
gives them. Metadata: `format` and `version`; `model`, the identity of the engine (`engine_identity`); `sha256` of all
tensors.
"""

import errno
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hybrid_rt.cache import LatentCache
from quant.errors import CheckpointError
from quant.files import put_in_place
from quant.manifest import MANIFEST_NAME
from quant.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from hybrid_rt.engine import Engine

FORMAT, VERSION = "dsr1-latents", "2"
TOKENS = "tokens"


@dataclass(frozen=True)
class CachedTokens:
    """tokens: their ids. rows: what the cache holds of them (`LatentCache.rows`)."""

    tokens: list[int]
    rows: Mapping[str, torch.Tensor]


def write_latents(path: Path, model: str, tokens: Sequence[int], rows: Mapping[str, torch.Tensor]) -> None:
    """Write `path`, whole or not at all. model: `engine_identity`. Raises OSError."""
    tensors = {TOKENS: torch.tensor(tokens, dtype=torch.int64)}
    tensors |= {name: tensor.contiguous() for name, tensor in rows.items()}
    metadata = {"format": FORMAT, "version": VERSION, "model": model, "sha256": checksum(tensors)}
    with put_in_place(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # a full disk, for one
            raise OSError(errno.EIO, str(error)) from None
        temporary.chmod(0o600)  # a conversation is nobody else's business


def read_latents(path: Path, model: str, cache: LatentCache) -> CachedTokens:
    """The tokens in `path`, for a cache of `cache`'s kind. Raises CheckpointError if it holds anything else."""
    file = SafetensorsFile.open(path)
    if file.metadata.get("format") != FORMAT or TOKENS not in file.names():
        raise CheckpointError(f"{path} is not a saved conversation; give a file that `save` wrote")
    if file.metadata.get("version") != VERSION:
        raise CheckpointError(f"{path} was saved by another version of dsr1; start a new conversation")
    if file.metadata.get("model") != model:
        raise CheckpointError(f"{path} belongs to another model or dtype; load the model it was saved with")
    expected = cache.rows(0, 0)
    tokens = file.tensor(TOKENS)
    rows = {name: file.tensor(name) for name in file.names() if name != TOKENS}
    fits = tokens.dim() == 1 and tokens.dtype == torch.int64 and rows.keys() == expected.keys()
    if not fits or not all(_is_part(rows[name], expected[name], len(tokens)) for name in expected):
        raise CheckpointError(f"{path} does not hold a cache of this model; start a new conversation")
    if checksum({TOKENS: tokens, **rows}) != file.metadata.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its checksum differs; start a new conversation")
    return CachedTokens(tokens.tolist(), rows)


def _is_part(found: torch.Tensor, expected: torch.Tensor, tokens: int) -> bool:
    shape = (expected.shape[0], tokens, *expected.shape[2:])
    return found.dtype == expected.dtype and tuple(found.shape) == shape


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and contiguous values, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def engine_identity(engine: "Engine") -> str:
    """What a cached token depends on besides the tokens before it, as 64 hexadecimal digits.

    The model's shape and norms, which tell a fine-tuned twin apart; the formats that the plan chose, and how many
    experts it defers; a store's manifest with the checksums of its files; and in which type the cache keeps what.
    """
    cache = engine.new_cache(1).rows(0, 0)
    kinds = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(cache.items())]
    formats = [(p.layer, p.component, p.representation) for p in engine.plan.placements]
    numbers = engine.transformer.dtype, engine.plan.deferred_experts
    digest = hashlib.sha256(f"{VERSION} {engine.config} {numbers} {kinds} {formats}".encode())
    for layer in range(engine.config.n_layers):
        norm = engine.transformer.get_submodule(f"layers.{layer}.attn_norm")
        digest.update(cast(torch.Tensor, norm.weight).cpu().numpy().tobytes())
    manifest = engine.folder / MANIFEST_NAME
    digest.update(manifest.read_bytes() if manifest.exists() else b"")
    return digest.hexdigest()

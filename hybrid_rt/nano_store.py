"""nano-r1's 4-bit store: made from the shipped checkpoint when it is first wanted, and kept in the user's cache."""

import hashlib
import shutil
import tempfile
from pathlib import Path

import quant
from hybrid_rt.models import NANO_R1
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import StoreError
from quant.kernels.ahead import ENCODING_KERNELS, PACKED_KERNELS, compile_ahead
from quant.progress import Steps, untold
from quant.recipes import DEFAULT_RECIPE, Recipe, find_recipe
from quant.store import is_store
from quant.user_cache import user_cache


def nano_store(recipe: str | None, compiling: Steps = untold) -> Path:
    """The folder of the store. Processes that make it at once do not meet: the first to finish puts its own in place.

    recipe: None for the default. compiling: told of the kernels that make the store and then run it. Raises OSError
    where the cache cannot be written, StoreError for an unknown recipe.
    """
    chosen = find_recipe(recipe or DEFAULT_RECIPE)
    folder = user_cache() / "stores" / f"nano-r1-{chosen.name}-{_fingerprint(chosen)}"
    if is_store(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    compile_ahead([*PACKED_KERNELS, *ENCODING_KERNELS], compiling)
    own = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        convert(Checkpoint.open(NANO_R1), own, recipe or DEFAULT_RECIPE)
        own.rename(folder)
    except StoreError as error:
        raise OSError(str(error)) from None
    except OSError:
        if not is_store(folder):
            raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return folder


def _fingerprint(recipe: Recipe) -> str:
    """Changes with the checkpoint and with anything that decides a store's bytes."""
    digest = hashlib.sha256(repr(recipe).encode())
    sources = Path(quant.__file__).parent
    for path in sorted([*NANO_R1.iterdir(), *sources.glob("*.py"), sources / "kernels" / "encode.py"]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]

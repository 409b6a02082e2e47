"""`dsr1 quantize --verify`: read a store once and compare every checksum."""

import json
from pathlib import Path

from cli.escape import say
from cli.quantize import shown_progress
from offload.sizes import format_size
from quant.store import Store


def verify(folder: str, as_json: bool = False) -> None:
    """Told on standard error as it goes. Raises StoreError for a store that is not what its manifest says."""
    store = Store.open(Path(folder).expanduser())
    with shown_progress() as show:
        store.verify(show)
    files = store.manifest.files
    nbytes = sum(file.nbytes for file in files.values())
    if as_json:
        print(json.dumps({"store": str(store.folder), "bytes": nbytes, "files": sorted(files), "ok": True}))
    else:
        say(f"{store.folder}: {len(files)} files, {format_size(nbytes)}, all checksums are right")

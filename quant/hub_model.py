"""One model on the Hub, at one commit: which files it has, and their bytes.

Everything goes through huggingface_hub, so HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean there,
and hf_xet is used where it is installed and the Hub offers it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from quant.errors import CheckpointError
from quant.files import sha256_of
from quant.hub import hub_errors, is_final
from quant.safetensors_file import LENGTH_BYTES, SafetensorsFile, header_length

FIRST_BYTES = 1 << 17  # of a file, which hold most headers whole
TRIES, FIRST_WAIT_S, LONGEST_WAIT_S = 8, 1.0, 60.0  # in all two minutes
FIRST_TRIES = 3  # before anything was begun
DOWNLOADS = 2  # of a file whose bytes are not those that the Hub tells of

T = TypeVar("T")


@dataclass(frozen=True)
class HubFile:
    """sha256: in hexadecimal; None for small files that git itself holds."""

    nbytes: int
    sha256: str | None


@dataclass(frozen=True)
class HubModel:
    """revision: the commit. files: by name."""

    hub_id: str
    revision: str
    files: Mapping[str, HubFile]

    @staticmethod
    def find(hub_id: str, revision: str | None = None) -> "HubModel":
        """Ask the Hub. revision: a branch, tag or commit. Raises CheckpointError in a sentence."""
        from huggingface_hub import HfApi

        ask = partial(HfApi().model_info, hub_id, revision=revision, files_metadata=True)
        info = _again(hub_id, ask, FIRST_TRIES)
        files = {}
        for entry in info.siblings or ():
            lfs = entry.lfs
            files[entry.rfilename] = HubFile(entry.size or 0, None if lfs is None else lfs.sha256)
        if info.sha is None:
            raise CheckpointError(f"the Hub does not say of which commit {hub_id} is; check HF_ENDPOINT")
        return HubModel(hub_id, info.sha, files)

    def download(self, name: str, folder: Path | None) -> Path:
        """One file, whole and checked, in `folder`; None: in the Hub's cache. It may be there already.

        Raises CheckpointError if it cannot be had, or is not what the Hub says it is.
        """
        from huggingface_hub import hf_hub_download

        known = self._file(name).sha256
        for _ in range(DOWNLOADS):
            ask = partial(hf_hub_download, self.hub_id, name, revision=self.revision, local_dir=folder)
            path = Path(_again(self.hub_id, ask))
            if known is None or sha256_of(path) == known:
                return path
            path.resolve().unlink()  # in the cache it is a link
            path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{name} of {self.hub_id} arrives damaged: its SHA-256 is not the one that the Hub gives for it ({known}); "
            "check the network and the disk, then give the same command again"
        )

    def name_in_cache(self, revision: str | None, name: str) -> None:
        """Let the Hub's cache know this commit as `revision`, so that others find it without asking; name: any file."""
        from huggingface_hub import hf_hub_download

        _again(self.hub_id, partial(hf_hub_download, self.hub_id, name, revision=revision))

    def cached(self, name: str) -> Path | None:
        """The file in the Hub's cache, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.hub_id, name, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def read(self, name: str, begin: int, nbytes: int) -> bytes:
        """Some bytes of a file, without downloading it. Raises CheckpointError."""
        return _again(self.hub_id, lambda: self._read(name, begin, nbytes))

    def header(self, name: str, path: Path) -> SafetensorsFile:
        """A safetensors file, by its header alone, as if it lay at `path`. Raises CheckpointError if it is damaged."""
        nbytes = self._file(name).nbytes
        first = self.read(name, 0, min(FIRST_BYTES, nbytes))
        end = LENGTH_BYTES + header_length(first[:LENGTH_BYTES], nbytes, path)
        if end > len(first):
            first += self.read(name, len(first), end - len(first))
        return SafetensorsFile.of_header(path, first[LENGTH_BYTES:end], nbytes)

    def _file(self, name: str) -> HubFile:
        if name not in self.files:
            raise CheckpointError(f"{self.hub_id} has no file {name}; give a model as its makers published it")
        return self.files[name]

    def _read(self, name: str, begin: int, nbytes: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        url = hf_hub_url(self.hub_id, name, revision=self.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{begin + nbytes - 1}"}
        answer = http_backoff("GET", url, headers=headers, timeout=60)
        hf_raise_for_status(answer)
        if len(answer.content) != nbytes:
            raise OSError(f"{len(answer.content)} bytes of {name} came instead of {nbytes}")
        return answer.content


def _again(hub_id: str, ask: Callable[[], T], tries: int = TRIES) -> T:
    """What `ask` gives, asked again after a while where the network or the Hub fails. Raises CheckpointError."""
    wait_s = FIRST_WAIT_S
    while True:
        try:
            return ask()
        except Exception as error:  # the HTTP library beneath, and so its errors, differ by version
            tries -= 1
            if not tries or is_final(error):
                with hub_errors(hub_id):
                    raise
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)

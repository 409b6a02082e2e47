"""A Hub on this machine: as much of its protocol as huggingface_hub uses to look a model up and to download it.

    with running(root) as server:                 # models are folders owner/name under `root`
        server.endpoint                           # for HF_ENDPOINT
        server.faults["model-00002-of-00003.safetensors"] = [Cut(after=1000), Busy(seconds=1)]
        server.requests                           # what was asked of the Hub and of its storage

Weights lie on a storage server of their own, as the Hub's do: `resolve` answers with a redirect to another port, and
who sends a token there is refused. What headers are called, and where they stand, was taken from huggingface_hub 2.4.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote, unquote, urlsplit

LFS = (".safetensors",)


@dataclass(frozen=True)
class Busy:
    """429, come again after a while."""

    seconds: int = 0


@dataclass(frozen=True)
class Broken:
    """An error of the server."""

    status: int = 503


@dataclass(frozen=True)
class Cut:
    """The connection ends after so many bytes."""

    after: int


@dataclass(frozen=True)
class Flipped:
    """A bit arrives changed."""

    at: int


Fault = Busy | Broken | Cut | Flipped


@dataclass
class HubServer:
    """endpoint: of the Hub. storage: where weights are. faults: for the next requests of a file's bytes."""

    root: Path
    endpoint: str = ""
    storage: str = ""
    commit: str = "1" * 40
    older: set[str] = field(default_factory=set)  # commits
    gated: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)  # that may read gated models
    offers_xet: bool = False
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range

    def asked(self, method: str, end: str) -> list[str]:
        """The ranges of requests whose path ends so."""
        return [span for used, path, span in self.requests if used == method and path.endswith(end)]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:  # noqa: N802
        self.route(False)

    def do_GET(self) -> None:  # noqa: N802
        self.route(True)

    def route(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        self.answer(path, with_body)

    def answer(self, path: str, with_body: bool) -> None:
        raise NotImplementedError

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"", with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, {"X-Error-Code": code, "X-Error-Message": code}, with_body=self.command != "HEAD")

    def send_file(self, file: Path, headers: dict[str, str], with_body: bool) -> None:
        """All of a file, or the range that is asked for, unless a fault is due."""
        faults = self.hub.faults[file.name] if with_body else []
        fault = faults.pop(0) if faults else None
        if isinstance(fault, Busy):
            self.reply(429, {"Retry-After": str(fault.seconds)})
            return
        if isinstance(fault, Broken):
            self.reply(fault.status, {})
            return
        body, status, whole = bytearray(file.read_bytes()), 200, file.stat().st_size
        if isinstance(fault, Flipped):
            body[fault.at] ^= 1
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(span[1]), min(int(span[2] or whole - 1), whole - 1)
            body, status = body[begin : end + 1], 206
            headers = {**headers, "Content-Range": f"bytes {begin}-{end}/{whole}"}
        if isinstance(fault, Cut):
            self.reply(status, {**headers, "Content-Length": str(len(body))}, with_body=False)
            body = body[: fault.after]
            self.close_connection = True
        else:
            self.reply(status, {**headers, "Content-Length": str(len(body))}, with_body=False)
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Hub(_Handler):
    def answer(self, path: str, with_body: bool) -> None:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if self.is_open(found[1], found[2] or "main", ask_gate=False):
                body = json.dumps(self.info(found[1], found[2] or "main")).encode()
                self.reply(200, {"Content-Type": "application/json"}, body, with_body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if self.is_open(found[1], found[2]):
                self.resolve(*found.groups())
        elif found := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            if self.is_open(found[1], found[2]):
                file = self.hub.root / found[1] / found[3]
                self.send_file(file, self.metadata(file, found[2]), with_body)
        else:
            self.refuse(404, "")

    def is_open(self, model: str, revision: str, ask_gate: bool = True) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not (self.hub.root / model).is_dir():
            self.refuse(401 if not token else 404, "RepoNotFound")
        elif revision not in ("main", self.hub.commit, *self.hub.older):
            self.refuse(404, "RevisionNotFound")
        elif ask_gate and model in self.hub.gated and token not in self.hub.tokens:
            self.refuse(403 if token else 401, "GatedRepo")
        else:
            return True
        return False

    def info(self, model: str, revision: str) -> dict[str, object]:
        folder = self.hub.root / model
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        sha = self.hub.commit if revision == "main" else revision
        return {"id": model, "sha": sha, "siblings": [self.sibling(folder, path) for path in files]}

    def sibling(self, folder: Path, path: Path) -> dict[str, object]:
        data, name = path.read_bytes(), path.relative_to(folder).as_posix()
        entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_id(data)}
        if name.endswith(LFS):
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def resolve(self, model: str, revision: str, name: str) -> None:
        """Texts are redirected on the Hub itself, weights to the storage."""
        file = self.hub.root / model / name
        if not file.is_file():
            self.refuse(404, "EntryNotFound")
            return
        headers = self.metadata(file, revision)
        if not name.endswith(LFS):
            location = f"/api/resolve-cache/models/{model}/{headers['X-Repo-Commit']}/{quote(name)}"
            self.reply(307, {**headers, "Location": location}, with_body=False)
            return
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.stat().st_size)}
        if self.hub.offers_xet:
            auth = f"{self.hub.endpoint}/api/models/{model}/xet-read-token/{self.hub.commit}"
            headers |= {"X-Xet-Hash": "2" * 64, "Link": f'<{auth}>; rel="xet-auth"'}
        location = f"{self.hub.storage}/{model}/{quote(name)}?signature=1"
        self.reply(302, {**headers, "Location": location}, with_body=False)

    def metadata(self, file: Path, revision: str) -> dict[str, str]:
        data, commit = file.read_bytes(), self.hub.commit if revision == "main" else revision
        etag = hashlib.sha256(data).hexdigest() if file.name.endswith(LFS) else git_id(data)
        return {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}


class _Storage(_Handler):
    def answer(self, path: str, with_body: bool) -> None:
        file = self.hub.root / path.strip("/")
        if self.headers.get("Authorization") or not file.is_file():
            self.refuse(400, "")  # a signed address takes no token
            return
        self.send_file(file, {"ETag": '"of the storage"', "Accept-Ranges": "bytes"}, with_body)


def git_id(data: bytes) -> str:
    """As git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running(root: Path) -> Iterator[HubServer]:
    """A Hub and its storage, until the end."""
    hub = HubServer(root)
    servers = []
    for handler in (_Hub, _Storage):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()

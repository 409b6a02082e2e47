"""`dsr1 quantize owner/name DST`, against a Hub on this machine (tests/hub_server.py).

Where the Hub is, and whether one may ask it, huggingface_hub reads from the environment when it is imported. So a
process of its own converts; one for all tests that need no other environment, as starting takes seconds.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.export.checkpoint import export_checkpoint
from quant.export.compressed_tensors import find_recipe
from quant.hub_shards import FOLDER
from quant.journal import JOURNAL_NAME
from quant.store import Store
from tests.hub_server import Broken, Busy, Cut, Flipped, HubServer, running
from tests.test_quantize import ROOT, SMALL, tree
from tests.tiny_checkpoint import shard_name, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL, SHARDS = "some/model", [shard_name(number, 3) for number in range(3)]
CLIENT = """
import contextlib, io, json, os, sys, time
from cli.export import export
from cli.quantize import HubOptions, find_source, quantize
from quant.convert import convert
from quant.errors import Dsr1Error

class StopError(Exception):
    pass

def stop_at(share):
    def progress(step):
        if step.done > share * step.total:
            raise StopError
    return progress

sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))  # between tries, ours and huggingface_hub's
for line in sys.stdin:
    asked = json.loads(line)
    os.environ.update(asked["environment"])
    out = io.StringIO()
    try:
        if asked["stop"] is None:
            with contextlib.redirect_stdout(out):
                hub = HubOptions(asked["revision"], asked["keep"])
                if asked["to"] is None:
                    quantize(asked["model"], asked["store"], "q8", 1, True, hub)
                else:
                    export(asked["model"], asked["store"], asked["to"], None, 1, True, hub)
            answer = json.loads(out.getvalue())
        else:
            from pathlib import Path
            store = Path(asked["store"])
            convert(find_source(asked["model"], store, HubOptions()), store, "q8", stop_at(asked["stop"]))
            answer = {}
    except (Dsr1Error, StopError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    for name in asked["environment"]:
        os.environ.pop(name)
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that converts what it is told to."""

    def __init__(self, home: Path, endpoint: str, **environment: str) -> None:
        env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT), **environment}
        command, pipe = [sys.executable, "-c", CLIENT], subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)

    def quantize(self, store: Path, model: str = MODEL, **asked: Any) -> dict[str, Any]:
        """The command's answer, or its error. asked: revision, keep, stop (a share), to, environment."""
        defaults = {"revision": None, "keep": False, "stop": None, "to": None, "environment": {}}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"store": str(store), "model": model, **defaults, **asked}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of the Hub: weights and their scales in different shards, so that scales must be asked for apart."""
    folder = tmp_path_factory.mktemp("hub")
    write_checkpoint(folder / MODEL, SMALL)
    (folder / MODEL / "tokenizer.json").write_text("{}")
    (folder / MODEL / "README.md").write_text("not taken")
    write_checkpoint(folder / "some/single", SMALL, shards=1)
    write_checkpoint(folder / "some/wide", SMALL | {"hidden_size": 64, "moe_intermediate_size": 64})
    (folder / "some/nothing").mkdir()
    (folder / "some/nothing/config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store, made from a folder."""
    store = tmp_path_factory.mktemp("whole") / "store"
    convert(Checkpoint.open(root / MODEL), store, "q8")
    return tree(store)


@pytest.fixture(scope="module")
def shared(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Client, Path]]:
    home = tmp_path_factory.mktemp("home")
    with running(root) as server:
        client = Client(home, server.endpoint, HF_HUB_DISABLE_PROGRESS_BARS="1")
        yield server, client, home
        client.close()


@pytest.fixture
def hub(shared: tuple[HubServer, Client, Path]) -> Iterator[HubServer]:
    """Without faults and memories, and with an empty cache on the client's side."""
    server, _, home = shared
    yield server
    server.faults.clear()
    server.requests.clear()
    server.gated.clear()
    server.tokens.clear()
    server.offers_xet = False
    server.commit = "1" * 40
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def client(shared: tuple[HubServer, Client, Path]) -> Client:
    return shared[1]


def cached_weights(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*.safetensors"))


def downloads(hub: HubServer, shard: str) -> int:
    """How often a file was asked for as a whole."""
    return hub.asked("GET", shard).count("")


def test_straight_from_the_hub(hub: HubServer, client: Client, whole: dict[str, bytes], tmp_path: Path) -> None:
    answer = client.quantize(tmp_path / "store")
    assert "error" not in answer, answer
    assert (answer["source"], answer["revision"]) == (MODEL, hub.commit)
    assert tree(tmp_path / "store") == whole  # nothing of the download is left, and nothing else differs
    Store.open(tmp_path / "store")
    for shard in SHARDS:  # each was downloaded once; its header and scales of weights elsewhere came as ranges
        assert downloads(hub, shard) == 1 and hub.asked("GET", shard)[0].startswith("bytes=0-")
    assert not hub.asked("GET", "README.md")


def test_an_export_straight_from_the_hub(hub: HubServer, client: Client, root: Path, tmp_path: Path) -> None:
    export_checkpoint(Checkpoint.open(root / "some/wide"), tmp_path / "from folder", find_recipe("experts"))
    answer = client.quantize(tmp_path / "packed", "some/wide", to="compressed-tensors")
    assert "error" not in answer, answer
    assert tree(tmp_path / "packed") == tree(tmp_path / "from folder")  # nothing of the download is left
    assert [downloads(hub, shard) for shard in SHARDS] == [1, 1, 1]


def test_a_single_file(hub: HubServer, client: Client, root: Path, tmp_path: Path) -> None:
    convert(Checkpoint.open(root / "some/single"), tmp_path / "from folder", "q8")
    assert "error" not in client.quantize(tmp_path / "store", "some/single")
    assert tree(tmp_path / "store") == tree(tmp_path / "from folder")


def test_kept_shards_are_found_by_others(
    hub: HubServer, client: Client, shared: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    home = shared[2]
    assert "error" not in client.quantize(tmp_path / "store", keep=True)
    assert tree(tmp_path / "store") == whole and set(cached_weights(home)) >= set(SHARDS)
    assert [downloads(hub, shard) for shard in SHARDS] == [1, 1, 1]
    assert "error" not in client.quantize(tmp_path / "second")  # takes them from there, and leaves them
    assert tree(tmp_path / "second") == whole and set(cached_weights(home)) >= set(SHARDS)
    assert [downloads(hub, shard) for shard in SHARDS] == [1, 1, 1]


def test_a_killed_conversion_keeps_its_commit(
    hub: HubServer, client: Client, whole: dict[str, bytes], tmp_path: Path
) -> None:
    store, first = tmp_path / "store", hub.commit
    assert "StopError" in client.quantize(store, stop=0.7)["error"]
    task = json.loads((store / JOURNAL_NAME).read_bytes().splitlines()[0])
    assert (task["hub"], task["revision"]) == (MODEL, first)
    stray = store / FOLDER / ".cache/huggingface/download/stray.incomplete"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(bytes(1000))
    hub.requests.clear()
    hub.older.add(first)
    hub.commit = "3" * 40  # somebody has pushed
    assert "another revision" in client.quantize(store, revision="main")["error"]
    answer = client.quantize(store)
    assert answer["revision"] == first and 0 < answer["converted_bytes"] < 0.5 * answer["source_bytes"]
    assert tree(store) == whole
    assert downloads(hub, SHARDS[0]) == 0  # what was converted is not downloaded again


@pytest.mark.parametrize(
    "faults",
    [
        [Busy(0)],
        [Broken(503), Broken(500)],
        [Cut(5000)],
        [Cut(0), Cut(20_000), Busy(0)],
        [Flipped(30_000)],
    ],
    ids=str,
)
def test_what_passes_is_got_over(
    hub: HubServer, client: Client, whole: dict[str, bytes], tmp_path: Path, faults: list[Any]
) -> None:
    """Also for ranges: the faults meet the header first where they are due at once."""
    hub.faults[SHARDS[1]] = [*faults]
    hub.faults[SHARDS[2]] = [*faults]
    answer = client.quantize(tmp_path / "store")
    assert "error" not in answer, answer
    assert not hub.faults[SHARDS[1]] and tree(tmp_path / "store") == whole


def test_a_bit_that_flips_every_time(hub: HubServer, client: Client, whole: dict[str, bytes], tmp_path: Path) -> None:
    hub.faults[SHARDS[1]] = [Flipped(40_000)] * 50
    error = client.quantize(tmp_path / "store")["error"]
    assert f"{SHARDS[1]} of {MODEL} arrives damaged" in error and "SHA-256" in error and "again" in error
    hub.faults.clear()
    assert "error" not in client.quantize(tmp_path / "store")
    assert tree(tmp_path / "store") == whole


def test_a_hub_that_stays_away(hub: HubServer, client: Client, whole: dict[str, bytes], tmp_path: Path) -> None:
    hub.faults[SHARDS[2]] = [Broken(503)] * 100
    error = client.quantize(tmp_path / "store")["error"]
    assert error.startswith(f"CheckpointError: {MODEL} cannot be") and "check the network" in error


def test_gated_models_need_a_token(hub: HubServer, client: Client, whole: dict[str, bytes], tmp_path: Path) -> None:
    hub.gated.add(MODEL)
    hub.tokens.add("hf_good")
    for environment in ({}, {"HF_TOKEN": "hf_bad"}):
        error = client.quantize(tmp_path / "store", environment=environment)["error"]
        assert f"{MODEL} is gated; accept its terms" in error and not (tmp_path / "store").exists()
    answer = client.quantize(tmp_path / "store", environment={"HF_TOKEN": "hf_good"})
    assert "error" not in answer, answer  # the storage refuses whoever shows it the token
    assert tree(tmp_path / "store") == whole


@pytest.mark.parametrize(
    ("model", "asked", "words"),
    [
        ("some/missing", {}, "there is no model some/missing on the Hub"),
        (MODEL, {"revision": "v7"}, "has no such revision"),
        ("some/nothing", {}, "some/nothing has no safetensors files"),
    ],
)
def test_what_the_hub_does_not_have(
    hub: HubServer, client: Client, tmp_path: Path, model: str, asked: dict[str, str], words: str
) -> None:
    error = client.quantize(tmp_path / "store", model, **asked)["error"]
    assert words in error and "\n" not in error and not (tmp_path / "store").exists()


def in_another_process(hub: HubServer, shared: Any, check: Callable[[Client, Path], None], **environment: str) -> None:
    client = Client(shared[2], hub.endpoint, **environment)
    try:
        check(client, shared[2])
    finally:
        client.close()


def test_offline(hub: HubServer, client: Client, shared: Any, whole: dict[str, bytes], tmp_path: Path) -> None:
    def check(offline: Client, _home: Path) -> None:
        error = offline.quantize(tmp_path / "store")["error"]
        assert "neither a folder nor in the local Hub cache" in error
        assert "error" not in client.quantize(tmp_path / "first", keep=True)
        hub.requests.clear()
        assert "error" not in offline.quantize(tmp_path / "store")
        assert tree(tmp_path / "store") == whole and not hub.requests

    in_another_process(hub, shared, check, HF_HUB_OFFLINE="1")


def test_xet_can_be_disabled(hub: HubServer, shared: Any, whole: dict[str, bytes], tmp_path: Path) -> None:
    """hf_xet is installed and the Hub offers it, but its storage is not there: plain HTTP does without."""
    hub.offers_xet = True

    def check(client: Client, _home: Path) -> None:
        assert "error" not in client.quantize(tmp_path / "store")
        assert tree(tmp_path / "store") == whole and not hub.asked("GET", f"xet-read-token/{hub.commit}")

    in_another_process(hub, shared, check, HF_HUB_DISABLE_XET="1")

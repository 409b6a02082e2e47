"""`dsr1 plan`: what it prints, for every kind of model, and what it reads of the Hub."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cli.plan import Output, find_subject
from cli.plan import plan as plan_model
from offload.machine import load_machine
from offload.plan import PlanError
from offload.topology import Node, Topology
from offload.wishes import Wishes
from quant.config import parse_config
from quant.errors import CheckpointError, ConfigError, ContextError, Dsr1Error, StoreError
from quant.manifest import Manifest
from quant.recipes import RECIPES, find_recipe
from tests.tiny_checkpoint import BF16, NO_MTP, tiny_config, write_checkpoint, write_files

R1 = "deepseek-ai/DeepSeek-R1"


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans do not depend on whether the machine that runs the tests was measured."""
    monkeypatch.setattr("offload.this_machine.measured_machine", lambda: load_machine("rtx-4090-ddr5"))


def plan(
    model: str,
    recipe: str | None = None,
    as_json: bool = False,
    explain: bool = False,
    save: Path | None = None,
    **wishes: Any,
) -> None:
    plan_model(model, Wishes(**wishes), recipe, Output(as_json, explain, save))


def as_json(capsys: pytest.CaptureFixture[str], model: str, **options: object) -> dict:
    plan(model, as_json=True, **options)  # type: ignore[arg-type]
    printed = capsys.readouterr()
    assert not printed.err
    return json.loads(printed.out)


def formats(plan_fields: dict, component: str) -> set[str]:
    return {p["representation"] for p in plan_fields["placements"] if p["component"] == component}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def make_store(folder: Path, recipe: str) -> Path:
    """As much of a store as planning reads."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    (folder / "dsr1-store.json").write_bytes(
        Manifest(RECIPES[recipe].of(parse_config(tiny_config(NO_MTP))), 0, {}).to_json()
    )
    return folder


def test_the_table_and_the_sums_of_r1(capsys: pytest.CaptureFixture[str]) -> None:
    plan(R1, gpu_mem="24G", ram="384G")
    out = capsys.readouterr().out
    assert f"{R1} as a store of recipe balanced" in out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["routed experts"][1:5] == ["experts", "3-60", "accurate", "RAM,"]
    assert rows["kv_b"][1:4] == ["0-60", "q8", "GPU"] and rows["head"][1:3] == ["q8", "GPU"]
    assert re.search(r"\d+ routed experts +3 +accurate +GPU", out)
    assert re.search(r"GPU: 2[34]\.\d GiB of 24\.0 GiB", out)
    assert re.search(r"RAM: 3(49|5[0-3])\.\d GiB of 384\.0 GiB, 3\d\.\d GiB free", out)
    assert re.search(r"A token moves 3\.9 MB over PCIe and reads 11,[34]\d\d MB from RAM", out)
    assert re.search(r"free; 3[45]\d\.\d GiB are files, which Linux can drop and read again", out)
    assert re.search(r"Predicted: prefill [\d.,]+ tokens/s .* decode [\d.]+ tokens/s \(limit: reading weights", out)
    assert "RTX 4090" in out and "not measured" in out and "Prefill goes in chunks" not in out
    plan(R1, gpu_mem="24G", ram="384G", explain=True)
    assert "Prefill goes in chunks of" in capsys.readouterr().out


def test_where_experts_live_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan(R1, gpu_mem="24G", ram="384G", residency="locked")
    assert re.search(r"routed experts +3-60 +accurate +RAM, locked +3[34]\d", capsys.readouterr().out)
    node = Node(0, (0,), 2**40, 2**40)
    monkeypatch.setattr("offload.wishes.read_topology", lambda: Topology((node, node)))
    plan(R1, gpu_mem="24G", ram="384G")
    out = capsys.readouterr().out
    assert re.search(r"routed experts +4-60 +accurate +RAM, copied +336", out)
    assert "split over 2 NUMA nodes" in out
    assert re.search(r"buffers of the experts +f32 +RAM, copied  ", out) and re.search(r"; 1\d\.\d GiB are files", out)
    assert as_json(capsys, R1, gpu_mem="24G", ram="384G")["nodes"] == 2


def test_json_is_one_object_with_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Dsr1Error, match="--ram"):  # 8 bits a weight: 660 GiB
        plan(R1, gpu_mem="24G", ram="384G", context=4096, recipe="q8")
    fields = as_json(capsys, R1, gpu_mem="24G", ram="1T", context=4096, recipe="q8")
    assert fields["model"] == R1 and fields["device"] == "cuda" and fields["context"] == 4096
    assert formats(fields, "routed_expert") == {"q8"}
    assert fields["gpu_bytes"] <= fields["gpu_budget"] == 24 * 2**30


def test_a_checkpoint_folder_is_planned_as_what_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = as_json(capsys, str(folder), device="cpu", ram="1G", context=256)
    assert formats(fields, "routed_expert") == formats(fields, "attention") == {"fp8_block"}
    assert formats(fields, "head") == {"bf16"} and formats(fields, "norm") == {"f32"}
    assert as_json(capsys, str(folder), device="cpu", ram="1G", context=256) == fields
    with_recipe = as_json(capsys, str(folder), device="cpu", ram="1G", context=256, recipe="fast")
    assert formats(with_recipe, "routed_expert") == {"fast"} and formats(with_recipe, "attention") == {"q8"}


def test_mtp_layers_that_a_checkpoint_leaves_out_are_not_planned(tmp_path: Path) -> None:
    fields = tiny_config(BF16)
    write_checkpoint(tmp_path, BF16 | NO_MTP, shards=1)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    subject = find_subject(str(tmp_path), None)
    assert not subject.inventory.mtp_layers
    assert {subject.available(spec) for spec in subject.inventory.by_component["attention"]} == {("bf16",)}


def test_a_store_folder_is_planned_from_its_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(tmp_path / "store", "fast")
    fields = as_json(capsys, str(store), device="emulate", gpu_mem="1100M", ram="1G", context=256)
    assert formats(fields, "routed_expert") == {"fast"} and "recipe fast" in fields["as"]
    assert max(p["layer"] or 0 for p in fields["placements"]) == 2  # no MTP layer
    assert find_subject(str(store), find_recipe("fast"))
    with pytest.raises(StoreError, match="is a store of recipe fast"):
        find_subject(str(store), find_recipe("accurate"))


def test_the_built_in_models(capsys: pytest.CaptureFixture[str]) -> None:
    store = as_json(capsys, "nano-r1", device="cpu", ram="1G", context=64)
    assert formats(store, "routed_expert") == {"accurate"}
    published = as_json(capsys, "nano-r1-fp8", device="cpu", ram="1G", context=64)
    assert formats(published, "routed_expert") == {"fp8_block"}


def test_models_that_this_version_does_not_run_are_planned_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    plan("moonshotai/Kimi-K2-Instruct", gpu_mem="24G", ram="1T")
    assert "planned only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        ("no-such-folder", {}, CheckpointError, "no folder no-such-folder"),
        (R1, {"recipe": "q3"}, StoreError, "'q3'"),
        (R1, {"gpu_mem": "much"}, Dsr1Error, "'much' is not a size"),
        (R1, {"gpu_mem": "24G", "context": 163841}, ContextError, "163841"),
        (R1, {"device": "tpu"}, Dsr1Error, "'tpu'"),
    ],
)
def test_what_cannot_be_planned(model: str, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        plan(model, **options)


def test_another_machine_is_planned_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fields = as_json(capsys, R1, hardware="xeon-6454s-x2")
    assert fields["gpu_budget"] == 24 * 2**30 and fields["nodes"] == 2 and fields["device"] == "cuda"
    assert 900 * 2**30 < fields["ram_budget"] < 1024 * 2**30
    fast, slow = (
        as_json(capsys, R1, hardware=name, ram="400G")["prediction"] for name in ("epyc-9355", "rtx-3090-ddr5")
    )
    assert fast["decode_tok_s"] > 3 * slow["decode_tok_s"]
    with pytest.raises(Dsr1Error, match="no machine 'abacus'.*epyc-9355"):
        plan(R1, hardware="abacus")
    (tmp_path / "m.json").write_text('{"version": 9}')
    with pytest.raises(Dsr1Error, match="not a machine of version 2"):
        plan(R1, hardware=str(tmp_path / "m.json"))


@pytest.fixture
def saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "plan.json"
    plan(R1, gpu_mem="24G", ram="384G", save=path)
    capsys.readouterr()
    return path


def test_a_saved_plan_is_the_same_again(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh, again = as_json(capsys, R1, gpu_mem="24G", ram="384G"), as_json(capsys, R1, plan=str(saved))
    for name in ("placements", "gpu_bytes", "ram_bytes", "prefill_chunk", "cache_format", "context", "device"):
        assert fresh[name] == again[name], name
    elsewhere = as_json(capsys, R1, plan=str(saved), hardware="xeon-6454s-x2")
    assert elsewhere["machine"]["name"] != again["machine"]["name"] and "date" in elsewhere["machine"]
    for name in ("placements", "gpu_bytes", "ram_bytes", "prefill_chunk"):
        assert elsewhere[name] == again[name], name
    pinned = as_json(capsys, R1, plan=str(saved), pins=("attention=accurate", "experts:60/0-3=gpu", "chunk=256"))
    attention = {p["representation"] for p in pinned["placements"] if p["component"] == "attention" and p["layer"] < 61}
    assert attention == {"accurate"} and pinned["prefill_chunk"] == 256
    assert [60, [0, 4], "gpu"] in [[p["layer"], p["experts"], p["tier"]] for p in pinned["placements"]]
    shorter = as_json(capsys, R1, plan=str(saved), context=4096)
    assert shorter["context"] == 4096 and shorter["gpu_bytes"] < fresh["gpu_bytes"]


def change(path: Path, **fields: object) -> str:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return str(path)


def test_plan_files_that_are_not_for_this_model(saved: Path) -> None:
    def refused(words: str, model: str = R1, **wishes: object) -> None:
        with pytest.raises(Dsr1Error, match=words) as error:
            plan(model, plan=str(saved), **wishes)
        assert "\n" not in str(error.value)

    refused("another model", "deepseek-ai/DeepSeek-V2")
    refused("as 'accurate' and is there as fast", recipe="fast")
    refused("takes 2[34]..* of 16.0 GiB", gpu_mem="16G")
    refused("163841", context=163841)
    whole = saved.read_text()
    placements = json.loads(whole)["placements"]
    for fields, words in (
        ({"version": 1}, "version 1, not 3"),
        ({"placements": placements[1:]}, "not exactly once"),
        ({"placements": [*placements, placements[0]]}, "not exactly once"),
        ({"placements": [placements[0] | {"tier": "disk"}, *placements[1:]]}, "on the disk"),
        ({"placements": [placements[0] | {"tier": "gpu"}, *placements[1:]]}, "cannot be in gpu"),
        ({"placements": [placements[0] | {"component": "wings"}, *placements[1:]]}, "not exactly once"),
        ({"placements": ["x"]}, "damaged"),
        ({"prefill_chunk": -1}, "prefill_chunk"),
        ({"context": 10**9}, "maximum"),
        ({"cache_format": "int2"}, "cache_format"),
        ({"deferred_experts": -1}, "deferred_experts"),
        ({"deferred_experts": 8}, "at least one must be computed"),
        ({"streaming": "yes"}, "streaming is 'yes'"),
        ({"streaming": {"from_tokens": 512, "slice_experts": 0}}, "slice_experts"),
        ({"device": "tpu"}, "device"),
    ):
        change(saved, **fields)
        refused(words)
        saved.write_text(whole)
    saved.write_text("{" * 100000)
    refused("is not a plan")
    saved.unlink()
    refused("there is no plan")


def test_sizes_of_nothing_are_refused() -> None:
    for wishes, words in (
        ({"gpu_mem": "0"}, "--gpu-mem is 0"),
        ({"ram": "0G"}, "--ram is 0G"),
        ({"gpu_mem": "-5G"}, "not a size"),
        ({"context": 0}, "too small"),
        ({"context": -1}, "too small"),
    ):
        with pytest.raises(Dsr1Error, match=words):
            plan(R1, **({"gpu_mem": "24G", "ram": "384G"} | wishes))
    with pytest.raises(PlanError, match="it needs --gpu-mem 1[01]G"):
        plan(R1, gpu_mem="2G", ram="384G", context=2048)


def test_damaged_folders_are_told(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=shard.name):
        find_subject(str(folder), None)
    shard.unlink()
    with pytest.raises(CheckpointError, match="lacks tensor"):
        find_subject(str(folder), None)
    for other in folder.glob("*.safetensors"):
        other.unlink()
    with pytest.raises(CheckpointError, match="no safetensors files"):
        find_subject(str(folder), None)


def test_folders_of_other_models_are_told(folder: Path) -> None:
    for text, words in (("{", "cannot be read"), ('{"model_type": "llama"}', "'llama'")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            find_subject(str(folder), None)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="no config.json"):
        find_subject(str(folder), None)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as reading a model's config.json and headers needs. Its models are folders under `root`."""

    root: Path
    served = 0

    def do_HEAD(self) -> None:  # noqa: N802
        self.answer(with_body=False)

    def do_GET(self) -> None:  # noqa: N802
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        found = re.fullmatch(r"/(some/[\w-]+)/resolve/main/([\w.-]+)", self.path)
        if found is None or not (self.root / found[1]).is_dir():
            code = "GatedRepo" if found and found[1] == "some/gated" else "RepoNotFound"
            self.reply(403 if code == "GatedRepo" else 404, {"X-Error-Code": code})
            return
        file = self.root / found[1] / found[2]
        if not file.exists():
            self.reply(404, {"X-Error-Code": "EntryNotFound"})
            return
        body, status, headers = file.read_bytes(), 200, {"ETag": f'"{found[2]}"', "X-Repo-Commit": "0" * 40}
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            whole, status = len(body), 206
            body = body[int(span[1]) : int(span[2]) + 1]
            headers["Content-Range"] = f"bytes {span[1]}-{int(span[1]) + len(body) - 1}/{whole}"
        self.reply(status, headers, body, with_body)

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"", with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
            Hub.served += len(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(root: Path) -> Iterator[str]:
    """Serve the folders under `root`; yields the address."""
    Hub.root, Hub.served = root, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ask_hub(endpoint: str, home: Path, *models: str) -> dict[str, dict[str, str]]:
    """What planning finds out about `models`, in a process of its own, as the address is read at import."""
    code = (
        "import json, sys\n"
        "from cli.plan import find_subject\n"
        "from quant.errors import Dsr1Error\n"
        "answers = {}\n"
        "for model in sys.argv[1:]:\n"
        "    try:\n"
        "        subject = find_subject(model, None)\n"
        "        found = {s.name: '+'.join(subject.available(s)) for s in subject.inventory.tensors}\n"
        "        answers[model] = {'title': subject.title, **found}\n"
        "    except Dsr1Error as error:\n"
        "        answers[model] = {'error': f'{type(error).__name__}: {error}'}\n"
        "assert not {'torch', 'numba'} & set(sys.modules)\n"
        "print(json.dumps(answers))\n"
    )
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code, *models]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_models_of_the_hub_are_read_from_their_headers(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    write_checkpoint(root / "some/fp8")
    write_checkpoint(root / "some/single", BF16, shards=1)
    write_files(root / "some/other", {"model_type": "llama"}, {})
    write_files(root / "some/awq", tiny_config() | {"quantization_config": {"quant_method": "awq"}}, {}, shards=1)
    (root / "some/no-weights").mkdir()
    (root / "some/no-weights/config.json").write_text(json.dumps(tiny_config()))
    (root / "some/nothing").mkdir()
    names = ("fp8", "single", "other", "awq", "no-weights", "nothing", "gated", "missing")
    with hub(root) as endpoint:
        answers = ask_hub(endpoint, tmp_path / "home", *(f"some/{name}" for name in names))
        served = Hub.served
    found = answers["some/fp8"]
    assert found["title"] == "some/fp8 as it is published"
    assert found["layers.1.ffn.experts.3.w2"] == "fp8_block" and found["head"] == "bf16"
    assert found["layers.1.ffn.gate.bias"] == "f32" and "layers.3.enorm" in found
    assert answers["some/single"]["layers.1.ffn.experts.3.w2"] == "bf16"
    expected = {
        "other": "ConfigError: config.json of some/other: model_type is 'llama'",
        "awq": "ConfigError: config.json of some/awq: quantization_config.quant_method is 'awq'",
        "no-weights": "CheckpointError: some/no-weights has no safetensors files",
        "nothing": "CheckpointError: some/nothing has no config.json",
        "gated": "CheckpointError: some/gated is gated; accept its terms",
        "missing": "CheckpointError: there is no model some/missing on the Hub",
    }
    for name, sentence in expected.items():
        assert answers[f"some/{name}"]["error"].startswith(sentence), answers[f"some/{name}"]
        assert "\n" not in answers[f"some/{name}"]["error"]
    weights = sum(file.stat().st_size for file in root.rglob("*.safetensors"))
    assert served < weights / 2


def test_without_a_network_it_says_so(tmp_path: Path) -> None:
    answers = ask_hub("http://127.0.0.1:9", tmp_path, "some/model")
    assert "cannot be looked up on the Hub" in answers["some/model"]["error"]
    assert "check the network" in answers["some/model"]["error"]

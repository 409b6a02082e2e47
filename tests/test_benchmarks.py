"""The scripts of benchmarks/: workers, rounds, tables and the models that they make. No peer is installed for them."""

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import environments, layer, model
from benchmarks.bandwidth import fastest_of_stress
from benchmarks.environments import Environment, Peer, environment
from benchmarks.gguf_layout import tensor_shapes, types_in
from benchmarks.layer_setup import METHODS, Method, Setup, r1_config
from benchmarks.model_setup import EOS, prompt, shape_fields
from benchmarks.random_store import write_store
from benchmarks.rounds import Measured, measure
from benchmarks.tables import machine, machine_line, markdown_table, parse_names, with_quartiles
from benchmarks.workers import Worker
from hybrid_rt import Engine
from offload.benchmark.measure import Effort, Run, Runs
from quant.config import parse_config
from quant.errors import Dsr1Error, StoreError
from quant.inventory import Inventory
from quant.kernels import set_threads, thread_count
from quant.packed import FAST, PACKED_FORMATS, Q8
from quant.store import Store
from tests.tiny_checkpoint import BF16, NO_MTP, RAGGED, tiny_config

# A peer: it prints what nobody asked for, as C++ libraries do, counts while it runs, and dies of a negative number.
FAKE = """
import os, threading, time
from benchmarks.protocol import serve, timed
os.write(1, b"loading ...\\n")
count = 0
def spin():
    global count
    while True:
        count += 1
        time.sleep(0.001)
def start():
    os.write(1, b"loaded\\n")
    print("ready, says Python")
    threading.Thread(target=spin, daemon=True).start()
    return {"weight_bytes": 12}, {"run": run, "count": lambda: {"count": count}}
def run(tokens, more=0):
    if tokens < 0:
        raise SystemExit("no such tokens")
    return timed(lambda: time.sleep(0.01 * tokens), 100 * tokens + more)
serve(start)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Worker]:
    with closing(Worker("fake", [sys.executable, "-c", FAKE], tmp_path / "log")) as worker:
        yield worker


def test_a_worker_answers_and_what_it_prints_goes_to_its_log(fake: Worker, tmp_path: Path) -> None:
    assert fake.about == {"weight_bytes": 12}
    run = fake.run("run 2")
    assert run.nbytes == 200 and 0.02 <= run.seconds < 2
    assert fake.run("run 1 7").nbytes == 107
    log = (tmp_path / "log").read_text()
    assert "loaded" in log and "ready, says Python" in log


def test_a_worker_stands_still_between_questions(fake: Worker) -> None:
    before = fake.ask("count")["count"]
    assert psutil.Process(fake._process.pid).status() == psutil.STATUS_STOPPED
    time.sleep(0.3)
    assert fake.ask("count")["count"] - before < 100  # 300 if it had gone on


def test_a_worker_that_dies_is_told_with_the_end_of_its_log(fake: Worker) -> None:
    with pytest.raises(Dsr1Error, match="fake ended with status 1(.|\n)*no such tokens"):
        fake.run("run -1")


def test_a_worker_that_never_gets_ready(tmp_path: Path) -> None:
    with pytest.raises(Dsr1Error, match="status 3"):
        Worker("fake", [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")


def test_a_closed_worker_is_gone(tmp_path: Path) -> None:
    worker = Worker("fake", [sys.executable, "-c", FAKE], tmp_path / "log")
    worker.close()
    assert not psutil.pid_exists(worker._process.pid)


def test_rounds_alternate_and_ratios_are_those_of_single_rounds(fake: Worker) -> None:
    times = {"peer": iter((9.0, 2.0, 8.0, 6.0)), "ours": iter((9.0, 1.0, 2.0, 2.0))}
    kinds = {name: (lambda values=values: Run(next(values), 10)) for name, values in times.items()}
    measured = measure(kinds, [fake], Effort(seconds=0, least=3))
    assert measured.ratios == (2.5, 3.0, 3.5)
    assert measured.to_json()["peer_ms"] == [6000, 4000, 7000]
    assert measured.to_json()["rounds"] == 3 and measured.foreign >= 0


def measured(nbytes: int = 200) -> Measured:
    def runs(seconds: float, nbytes: int) -> Runs:
        return Runs((Run(seconds, nbytes),) * 2)

    return Measured({"peer": runs(4e-3, 150), "ours": runs(2e-3, nbytes), "read": runs(1e-3, 200)}, 0.25)


def test_a_layers_row_tells_the_share_of_the_floor() -> None:
    row = layer.Row("AMXINT4", "fast", Setup(2, 256, 2048), 16, measured())
    assert row.floor_share == 0.5
    cells = dict(zip(layer.HEADS, row.cells(), strict=True))
    assert cells["kt-kernel ms"] == "4.00 (4.00–4.00)" and cells["times as fast"] == "2.00 (2.00–2.00)"
    assert cells["of floor"] == "50%" and cells["others"] == "0.25"
    fields = row.to_json()
    assert (fields["tokens"], fields["ours_bytes"], fields["ratio"], fields["floor_share"]) == (16, 200, [2, 2, 2], 0.5)


@pytest.mark.parametrize("work", model.WORK)
def test_a_models_row_tells_tokens_a_second(work: str) -> None:
    row = model.Row(model.Setup("Q4_0", True, "fast", 2), work, measured(nbytes=0 if work == "prefill" else 100))
    tokens = {"prefill": 512, "decode": 64}[work]
    cells = dict(zip(model.HEADS, row.cells(), strict=True))
    assert cells["dsr1 tok/s"].startswith(f"{tokens / 2e-3:.1f} (")
    assert cells["of read"] == ("" if work == "prefill" else "25%")
    assert row.to_json()["peer_tok_s"][0] == tokens / 4e-3


def test_formats_stand_beside_those_with_as_many_bits() -> None:
    assert [fmt.name for fmt in layer.formats_beside(METHODS["RAWINT4"], list(PACKED_FORMATS))] == ["fast", "accurate"]
    assert layer.formats_beside(METHODS["AMXINT8"], ["fast", "q8"]) == [Q8]


def test_what_does_not_fit_is_left_out_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    peer, ours = 256 * 3 * 7168 * 2048 // 2, 256 * FAST.nbytes((7168, 2048)) * 3
    assert Method(4, 0.5).layer_bytes(r1_config(), 256) == peer
    assert layer.fits("AMXINT4", FAST, 256, peer + ours + layer.SPARE_BYTES)
    assert not layer.fits("AMXINT4", FAST, 256, peer + ours + layer.SPARE_BYTES - 1)
    assert "AMXINT4 beside fast is left out" in capsys.readouterr().err
    assert not layer.fits("RAWINT4", FAST, 256, peer + ours + layer.SPARE_BYTES)


def test_errors_of_both_sides_in_one_table() -> None:
    ours = layer.parse_errors("fast: 0.1390\nq8: 0.0149\n")
    table = layer.error_table(ours, {"AMXINT4": 0.3049})
    assert table.splitlines()[2:] == ["| dsr1 fast | 0.139 |", "| dsr1 q8 | 0.015 |", "| kt-kernel AMXINT4 | 0.305 |"]


def test_tables_and_names() -> None:
    assert markdown_table(("a", "b"), [("x", "1")]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert with_quartiles(2, (1, 3.5), ".1f") == "2.0 (1.0–3.5)"
    assert parse_names("b,a,", ("a", "b")) == ["b", "a"]
    with pytest.raises(Dsr1Error, match="no 'c' to measure; give some of a,b"):
        parse_names("c", ("a", "b"))


def test_the_machine_is_told(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 amx_int8\n\nprocessor\t: 1\n")
    fields = machine(cpuinfo)
    assert (fields["processor"], fields["flags"]) == ("A CPU", ["avx2", "amx_int8"])
    assert machine_line(fields).startswith("A CPU, ")
    assert machine(tmp_path / "missing")["flags"] == []


def peer_like(version: str, **more: str) -> Peer:
    return Peer("peer", version, (), "version = '1.0'; system = 'AVX2 = 1 | AMX = 1'; print('noise')", **more)  # type: ignore[arg-type]


@pytest.fixture
def envs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the peer's versions 1.0 and 2.0 seem to be installed; installing changes nothing."""
    for version in ("1.0", "2.0"):
        python = environments._python(tmp_path / f"peer-{version}")
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
    monkeypatch.setattr(environments, "_install", lambda peer, folder: None)
    return tmp_path


def test_an_environment_is_used_again(envs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_install", None)
    found = environment(peer_like("1.0"), envs)
    assert found == Environment(found.peer, envs / "peer-1.0", "AVX2 = 1 | AMX = 1")
    assert found.label == "peer 1.0" and environments.describe([found])["peer"]["version"] == "1.0"


def test_an_environment_of_another_version_or_build_is_refused(envs: Path) -> None:
    for peer in (peer_like("2.0"), peer_like("3.0"), peer_like("1.0", unwanted="AMX = 1")):
        with pytest.raises(Dsr1Error, match=f"does not work as peer {peer.version}.*remove the folder"):
            environment(peer, envs)


def test_stress_ng_counts_in_its_fastest_way_of_reading() -> None:
    lines = "metrc: [1] memrate    3000.50 write64 MB per sec\nmetrc: [1] memrate    1000.50 read64 MB per sec (x)\n"
    assert fastest_of_stress(lines + "metrc: [1] memrate   2000.00 read128 MB per sec\n") == 2000 * 2**20
    with pytest.raises(Dsr1Error, match="did not come to reading"):
        fastest_of_stress(lines.splitlines()[0])


def test_prompts_are_the_same_on_both_sides_and_hold_no_special_token() -> None:
    assert prompt(64, 100) == prompt(64, 100) != prompt(64, 101)
    assert len(prompt(512, 100)) == 512 and min(prompt(512, 100)) > EOS and max(prompt(512, 100)) < 100


@pytest.mark.parametrize("q_lora_rank", [None, 128])
def test_a_gguf_holds_as_many_weights_as_the_model(q_lora_rank: int | None) -> None:
    config = parse_config(shape_fields("moonlight", routed=12) | {"q_lora_rank": q_lora_rank})
    held = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
    assert held == sum(spec.parameters for spec in Inventory.of(config).tensors)


def test_types_of_a_dry_run() -> None:
    text = (
        "[   1/ 300] output_norm.weight   - [ 2048,     1,     1,     1], type =    f32, size =    0.008 MiB\n"
        "[   2/ 300] blk.0.ffn_up_exps.weight - [ 2048, 12, 1, 1], type = f16, size = 64.0 MiB -> 26.2 MiB (q6_K)\n"
    )
    assert types_in(text) == {"output_norm.weight": "F32", "blk.0.ffn_up_exps.weight": "Q6_K"}


@pytest.mark.parametrize("ragged", [{}, RAGGED], ids=["whole", "ragged"])
def test_a_random_store_opens_and_runs(ragged: dict[str, object], tmp_path: Path) -> None:
    fields = tiny_config(ragged | BF16 | NO_MTP)
    write_store(tmp_path / "store", fields, FAST, Q8)
    store = Store.open(tmp_path / "store")
    store.verify(lambda _: None)
    assert store.record(2).format is FAST and store.representations("head") == ("q8",)
    expert = store.weight("layers.2.ffn.experts.3.w2").dequantize(torch.float32)
    assert expert.std() * expert.shape[1] ** 0.5 == pytest.approx(1, rel=0.1)
    before = thread_count(), torch.get_num_threads()
    try:
        logits = Engine.load(tmp_path / "store", device="cpu", threads=1).logits([5, 6, 7])
    finally:
        set_threads(before[0])
        torch.set_num_threads(before[1])
    assert torch.isfinite(logits).all() and logits.std() > 0.1
    with pytest.raises(StoreError, match="finished store"):
        write_store(tmp_path / "store", fields, FAST, Q8)


def test_linears_of_a_random_store_may_have_four_bits_alone(tmp_path: Path) -> None:
    write_store(tmp_path / "store", tiny_config(BF16 | NO_MTP), FAST, FAST)
    assert Store.open(tmp_path / "store").representations("layers.0.attn.wo") == ("fast",)


def test_workers_of_one_layer_are_told_the_same() -> None:
    assert replace(Setup(1, 8, 16), threads=2).words() == ["--threads=2", "--experts=8", "--max-tokens=16"]

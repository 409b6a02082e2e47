"""`dsr1 bench`: what is read, drawn and counted, and what it prints. Speeds themselves are not tested."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.bench import bench, find_shape, parse_tokens
from offload.benchmark import plot as plotting
from offload.benchmark.draw import ExpertDraw
from offload.benchmark.layer import ENOUGH_BYTES, BenchLayers, Extent, Turn, choose_extent
from offload.benchmark.limits import expert_ranges, range_bytes, record_ranges
from offload.benchmark.measure import Effort, Run, Runs, alternate
from offload.benchmark.report import Report, Wanted, measure_shape, thread_steps
from offload.costs import Costs
from offload.experts import CpuExperts
from offload.machine import load_machine
from offload.workspace import host_bytes
from quant import isa
from quant.config import parse_config
from quant.errors import Dsr1Error
from quant.isa import has_tiles
from quant.kernels import bandwidth, set_threads, thread_count
from quant.kernels.tile_instructions import PEAK_BYTES, PEAK_OPERATIONS
from quant.packed import ACCURATE, FAST, PACKED_FORMATS, ExpertRecord, PackedFormat
from quant.packing import decode
from tests.tiny_checkpoint import TINY

CONFIG = parse_config(TINY)  # 16 experts of (256, 128), 4 a token, 2 layers of them
SHORT = Wanted((1, 3), (8,), Effort(seconds=0, least=2))
GIB = 2**30
by_name = pytest.mark.parametrize("fmt", PACKED_FORMATS.values(), ids=lambda fmt: fmt.name)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, on a machine that need not be measured first."""
    machine = replace(load_machine("rtx-4090-ddr5"), cores=1, isa=isa.current())
    monkeypatch.setattr("cli.bench.probe", lambda tell: machine)
    monkeypatch.setattr("cli.bench.keep", lambda machine: None)
    before, torch_before = thread_count(), torch.get_num_threads()
    set_threads(1)
    yield
    set_threads(before)
    torch.set_num_threads(torch_before)


def quiet(_: str) -> None:
    pass


def make_layers(fmt: PackedFormat = ACCURATE, tokens: int = 8) -> BenchLayers:
    return BenchLayers(CONFIG, fmt, Extent(2, 16), tokens, quiet)


def word_sum(data: torch.Tensor) -> int:
    return int(data.contiguous().numpy().reshape(-1).view(np.uint32).sum(dtype=np.uint64)) & 0xFFFFFFFF


@pytest.mark.parametrize("variant", bandwidth.READ_VARIANTS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_word_of_every_range_is_read_once(variant: bandwidth.ReadVariant, threads: int) -> None:
    set_threads(threads)
    pages = torch.randint(0, 256, (400, bandwidth.PAGE), dtype=torch.uint8)
    spans = [(0, 1), (2, 7), (10, 300), (320, 0), (390, 10)]
    ranges = torch.tensor([(pages[first:].data_ptr(), count) for first, count in spans])
    read = torch.cat([pages[first : first + count] for first, count in spans])
    assert bandwidth.read_ranges(ranges, variant) == word_sum(read)
    assert bandwidth.read_ranges(ranges[:2], variant) == word_sum(read[:8])  # too little to share out


def test_the_peak_multiplies_what_it_counts() -> None:
    side, rounds = bandwidth.SIDE, 2 * bandwidth.OPERAND_ROUNDS + 3
    operands = torch.randint(0, 256, (bandwidth.OPERAND_BYTES,), dtype=torch.uint8)
    lines = operands.numpy().reshape(bandwidth.OPERAND_ROUNDS, 2 * side, -1)
    weights, x = lines[:, :side].astype(np.int64), lines[:, side:].view(np.int8).astype(np.int64)
    each = np.einsum("ril,rjl->r", weights, x)
    total = sum(int(each[at % bandwidth.OPERAND_ROUNDS]) for at in range(rounds))
    assert bandwidth.multiply_bytes(operands, rounds) == total & 0xFFFFFFFF
    assert weights[0].size * side * 2 == bandwidth.ROUND_OPERATIONS


@pytest.mark.skipif(not has_tiles(), reason="this processor has no AMX, or the system does not grant it")
def test_the_peak_of_tiles_multiplies_what_it_counts() -> None:
    set_threads(2)
    operands = torch.randint(0, 256, (2, PEAK_BYTES), dtype=torch.uint8)
    before = operands.clone().view(torch.int8).numpy().astype(np.int64).reshape(2, 8, 16, 64)
    bandwidth.multiply_tiles(operands, 3)
    sums = operands.view(torch.int32).numpy().reshape(2, 8, 16, 16)[:, 4:]
    for part in range(2):
        for number in range(4):
            a, b = before[part, number // 2], before[part, 2 + number % 2].reshape(16, 16, 4)
            expected = np.einsum("tkq,knq->tn", a.reshape(16, 16, 4), b)
            np.testing.assert_array_equal(sums[part, number], 3 * expected)
    assert PEAK_OPERATIONS == 2 * 4 * 16 * 16 * 64


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 9), st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(0, 2**32)
)
def test_all_experts_come_before_any_comes_again(experts: int, top_k: int, calls: list[int], seed: int) -> None:
    top_k = min(top_k, experts)
    draw = ExpertDraw(experts, top_k, seed)
    counts = Counter(dict.fromkeys(range(experts), 0))
    for tokens in calls:
        ids = draw.draw(tokens)
        assert ids.shape == (tokens, top_k) and len(set(ids.flat)) == min(experts, ids.size)
        for token in ids.tolist():
            assert len(set(token)) == top_k
            counts.update(token)
            assert len(counts) == experts and max(counts.values()) - min(counts.values()) <= 1


def test_draws_are_random_and_possible() -> None:
    orders = {tuple(ExpertDraw(256, 8, seed).draw(32).reshape(-1).tolist()) for seed in range(3)}
    assert len(orders) == 3 and tuple(range(256)) not in orders
    with pytest.raises(ValueError, match="9 different experts"):
        ExpertDraw(8, 9, 0)


def expert_matrices(turn: Turn, expert: int) -> list[torch.Tensor]:
    """w1, w3 and w2 in float64."""
    record, data = turn.packed.record, turn.packed.records[expert].numpy()
    shape = (record.inter_dim, record.dim)
    places = ((record.w1, shape), (record.w3, shape), (record.w2, shape[::-1]))
    decoded = (decode(data[at : at + record.format.nbytes(s)], record.format, s) for at, s in places)
    return [torch.from_numpy(matrix).double() for matrix in decoded]


@by_name
def test_the_layer_computes_its_random_experts(fmt: PackedFormat) -> None:
    layers = make_layers(fmt)
    for turn in (layers.turn(3), layers.turn(2)):
        x = layers._x[: len(turn.ids)].double()
        expected = torch.zeros_like(x)
        for t, token in enumerate(turn.ids.tolist()):
            for expert, weight in zip(token, turn.weights[t].tolist(), strict=True):
                w1, w3, w2 = expert_matrices(turn, expert)
                assert 0.8 < w1.square().mean().sqrt() * CONFIG.dim**0.5 < 1.25
                expected[t] += weight * (w2 @ (torch.nn.functional.silu(w1 @ x[t]) * (w3 @ x[t])))
        error = (layers.run(turn).double() - expected).norm() / expected.norm()
        assert error < 0.03


@by_name
def test_a_token_s_call_is_played_from_a_recording(fmt: PackedFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = make_layers(fmt)
    calls = set()
    for threads in (1, 2, 1):
        set_threads(threads)
        for turn in (layers.turn(1), layers.turn(1), layers.turn(1)):
            expected = turn.layer.sync(turn.layer.submit(layers._x[:1], turn.ids, turn.weights)).clone()
            with monkeypatch.context() as patch:
                patch.setattr(CpuExperts, "submit", None)  # not called any more
                assert torch.equal(layers.run(turn), expected)
            calls.add((turn.layer, thread_count()))
    assert len(layers._token_calls) == len(calls)


def test_layers_take_turns_and_experts_differ() -> None:
    layers = make_layers()
    turns = [layers.turn(2) for _ in range(4)]
    assert [turn.layer for turn in turns] == layers.layers * 2
    for first, second in zip(turns[:2], turns[2:], strict=True):
        assert len(first.chosen) == 8 and not set(first.chosen) & set(second.chosen)
        assert torch.allclose(first.weights.sum(dim=1), torch.ones(2))
    records = torch.cat([packed.records for packed in layers.packed])
    assert len({row.numpy().tobytes() for row in records}) > len(records) // 2


def test_ranges_are_the_memory_of_the_chosen_experts() -> None:
    layers = make_layers()
    turn = layers.turn(2)
    ranges = record_ranges(turn.packed, turn.chosen)
    assert range_bytes(ranges) == 8 * layers.record.nbytes
    read = bandwidth.read_ranges(ranges, bandwidth.READ_VARIANTS[0])
    assert read == word_sum(turn.packed.records[turn.chosen])
    every = expert_ranges(layers.layers, layers.weight_bytes)
    assert range_bytes(every) == layers.weight_bytes == 32 * layers.record.nbytes
    assert range_bytes(expert_ranges(layers.layers, 1)) == layers.weight_bytes // 2


def test_runs_alternate_and_the_first_do_not_count() -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> Run:
        order.append(name)
        return Run(seconds if len(order) > 2 else 1e9, 10)

    first, second = alternate(lambda: run("a", 1), lambda: run("b", 2), effort=Effort(seconds=0, least=3))
    assert order == ["a", "b"] * 4
    assert first.runs == (Run(1, 10),) * 3 and second.runs == (Run(2, 10),) * 3
    order.clear()
    first, _ = alternate(lambda: run("a", 1), lambda: run("b", 2), effort=Effort(seconds=1e9, least=2, most=5))
    assert len(first.runs) == 5


def test_medians_and_quartiles() -> None:
    runs = Runs(tuple(Run(seconds, 100) for seconds in (5.0, 1.0, 2.0, 4.0, 3.0)))
    assert runs.seconds == 3 and runs.seconds_quartiles == (2, 4)
    assert runs.bytes_s == 100 / 3 and runs.bytes_s_quartiles == (25, 50)
    assert Runs((Run(1, 30), Run(1, 10))).nbytes == 10  # one that there was, not their mean


def test_as_much_as_fits_is_measured() -> None:
    r1, moonlight = find_shape("r1"), find_shape("moonlight")
    record = ExpertRecord(ACCURATE, 7168, 2048)
    assert find_shape("v3") == r1
    assert choose_extent(r1, ACCURATE, 16, 64 * GIB) == Extent(1, 256)
    few = choose_extent(r1, ACCURATE, 16, 4 * GIB)
    assert few.layers == 1 and 4 * GIB - GIB // 4 < few.experts * record.nbytes < 4 * GIB
    with pytest.raises(Dsr1Error, match="smaller shape"):
        choose_extent(r1, ACCURATE, 16, 7 * record.nbytes)
    layers, experts = 14, 64
    assert choose_extent(moonlight, ACCURATE, 16, 64 * GIB) == Extent(layers, experts)
    nbytes = experts * ExpertRecord(ACCURATE, 2048, 1408).nbytes
    assert (layers - 1) * nbytes < ENOUGH_BYTES <= layers * nbytes
    assert choose_extent(moonlight, ACCURATE, 16, 2 * GIB).layers < layers
    assert choose_extent(find_shape("nano"), ACCURATE, 16, 64 * GIB) == Extent(4, 32)  # all that it has


def test_threads_go_up_in_powers_of_two() -> None:
    assert [thread_steps(count) for count in (1, 2, 6, 8)] == [[], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.fixture(scope="module")
def report() -> Report:
    before = thread_count()
    set_threads(2)
    try:
        return measure_shape("tiny", make_layers(), SHORT, quiet)
    finally:
        set_threads(before)


def test_the_report_counts_bytes_and_operations(report: Report) -> None:
    record = ExpertRecord(ACCURATE, 256, 128)
    fields = json.loads(json.dumps(report.to_json()))
    assert fields["weight_bytes"] == 32 * record.nbytes
    assert {name: fields[name] for name in ("shape", "format", "threads", "layers", "experts")} == {
        "shape": "tiny",
        "format": "accurate",
        "threads": 2,
        "layers": 2,
        "experts": 16,
    }
    assert isinstance(fields["isa"], str) and fields["read_gb_s"] > 0 and fields["peak_gop_s"] > 0
    assert [point["tokens"] for point in fields["decode"] + fields["prefill"]] == [1, 3, 8]
    assert [(point["tokens"], point["threads"]) for point in fields["scaling"]] == [(1, 1), (1, 2)]
    for point in fields["decode"] + fields["prefill"] + fields["scaling"]:
        assert point["experts"] == min(16, 4 * point["tokens"]) and point["runs"] == 2
        assert point["bytes"] == point["experts"] * record.nbytes
        operations = 2 * 3 * 256 * 128 * 4 * point["tokens"]
        assert point["gflop_s"] == pytest.approx(operations / point["ms"] / 1e6)
        assert point["read_share"] == pytest.approx(point["gb_s"] / point["read_gb_s"])
    assert all(point["share"] == point["read_share"] for point in fields["decode"] + fields["scaling"])
    assert all(point["share"] == point["peak_share"] for point in fields["prefill"])


def test_plain_reads_read_as_much_as_the_layer(report: Report) -> None:
    for point in (*report.decode, *report.prefill):
        assert point.read.nbytes == point.layer.nbytes and len(point.read.runs) == len(point.layer.runs)


def test_a_shape_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    bench(shape="nano", fmt="fast", decode="2", prefill="", threads=1, as_json=True)
    printed = capsys.readouterr()
    fields = json.loads(printed.out)
    assert (fields["shape"], fields["format"], fields["threads"]) == ("nano", "fast", 1)
    record = ExpertRecord(FAST, 256, 64).nbytes
    machine = replace(load_machine("rtx-4090-ddr5"), cores=1)
    predicted = Costs(find_shape("nano"), machine).experts_alone("fast", record, 8, 8).seconds
    assert fields["decode"][0]["predicted_ms"] == pytest.approx(1e3 * predicted)
    assert fields["decode"][0]["tokens"] == 2 and not fields["prefill"] and not fields["scaling"]
    assert "making" in printed.err and "may stay in a cache" in printed.err


def test_a_shape_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    bench(shape="nano", decode="1", prefill="5", threads=1)
    lines = capsys.readouterr().out.splitlines()
    assert "4 x 32 experts" in lines[0] and lines[1].startswith("limits:")
    assert lines[2].split()[:3] == ["tokens", "threads", "ms"]
    assert [line.split()[:3] for line in lines[3:]] == [["decode", "1", "1"], ["prefill", "5", "1"]]


def test_fewer_experts_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = find_shape("nano")
    room = 16 * ExpertRecord(ACCURATE, config.dim, config.moe_inter_dim).nbytes
    monkeypatch.setattr("cli.bench.usable_ram", lambda: host_bytes(config, 1) + room)
    bench(shape="nano", decode="1", prefill="", threads=1, as_json=True)
    printed = capsys.readouterr()
    experts = json.loads(printed.out)["experts"]
    assert experts == 16 and f"only {experts} of 32 experts fit" in printed.err


def test_a_model_as_json(chat_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(str(chat_folder), threads=1, as_json=True)
    printed = capsys.readouterr()
    fields = json.loads(printed.out)
    assert fields["model"] == str(chat_folder) and fields["threads"] == 1 and fields["device"] == "cpu"
    assert (fields["prefill_tokens"], fields["prompt_tokens"], fields["decode_tokens"]) == (512, 64, 64)
    assert fields["prefill_tok_s"] > 0 and fields["decode_tok_s"] > 0
    assert fields["decode_gb_s"] == pytest.approx(fields["decode_ram_bytes"] * fields["decode_tok_s"] / 1e9)
    assert fields["share"] == pytest.approx(fields["decode_gb_s"] / fields["read_gb_s"])
    assert fields["read_bytes"] == 2 * 16 * 3 * 256 * 128  # all of its experts, in FP8
    predicted, memory = fields["predicted"], fields["memory"]
    assert predicted["prefill_tok_s"] > 0 and predicted["decode_tok_s"] > 0 and predicted["decode_limit"]
    files = sum(file.stat().st_size for file in chat_folder.glob("*.safetensors"))
    assert memory["mapped"] >= files // 2 and memory["planned"] > 0
    assert "measuring" in printed.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": "r2"}, "no shape 'r2'; give one of r1, v3"),
        ({"shape": "nano", "fmt": "q3"}, "no format 'q3'; give one of fast, accurate, q8"),
        ({"shape": "nano", "model": "nano-r1"}, "leave out nano-r1 or --shape nano"),
        ({"fmt": "fast"}, "give --shape"),
        ({"model": "nano-r1", "decode": "1"}, "give --shape"),
        ({"shape": "nano", "decode": "1,x"}, "--decode is '1,x'"),
        ({"shape": "nano", "prefill": "0"}, "--prefill is '0'"),
        ({"shape": "nano", "plot": Path("no-such-folder/roof.png")}, "plot"),
        ({"model": "no-such-folder"}, "there is no folder no-such-folder"),
    ],
)
def test_what_cannot_be_measured(options: dict[str, Any], words: str) -> None:
    with pytest.raises(Dsr1Error, match=words):
        bench(**options)


def test_numbers_of_tokens() -> None:
    assert parse_tokens("--decode", "1, 2,16") == (1, 2, 16) and parse_tokens("--decode", "") == ()
    with pytest.raises(Dsr1Error, match="as in 1,4,16"):
        parse_tokens("--decode", "-1")


def test_plots_need_matplotlib_and_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plotting, "find_spec", lambda _: None)
    with pytest.raises(Dsr1Error, match="matplotlib, which is not installed"):
        plotting.check_plot(tmp_path / "roof.png")
    monkeypatch.setattr(plotting, "find_spec", lambda _: object())
    plotting.check_plot(tmp_path / "roof.png")
    with pytest.raises(Dsr1Error, match="ends in .png or .svg"):
        plotting.check_plot(tmp_path)
    with pytest.raises(Dsr1Error, match="folder does not exist"):
        plotting.check_plot(tmp_path / "none" / "roof.png")


@pytest.mark.parametrize("decode", [True, False])
def test_the_roofline_holds_every_point(
    report: Report, decode: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figure = MagicMock()
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", SimpleNamespace(Figure=lambda **_: figure))
    shown = report if decode else replace(report, decode=())
    plotting.draw_roofline(shown, tmp_path / "roof.png")
    limit, *series = figure.subplots().plot.call_args_list
    ends, heights = limit.args[:2]
    assert heights[1:] == [pytest.approx(report.limits.peak / 1e9)] * 2
    assert heights[0] == pytest.approx(ends[0] * report.limits.read.bytes_s / 1e9)
    points = [point for call in series for point in zip(*call.args[:2], strict=True)]
    expected = [plotting.place(point) for point in (*shown.decode, *shown.prefill)]
    assert points == expected and points[-1][0] == pytest.approx(
        2 * 3 * 256 * 128 * 32 / report.prefill[0].layer.nbytes
    )
    figure.savefig.assert_called_once()


def test_the_roofline_is_a_picture(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plotting.draw_roofline(report, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")

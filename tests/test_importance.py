"""What weighs the encoder's search: a calibration against a plain forward pass, and llama.cpp's importance matrices."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cli.importance import find_importance
from cli.quantize import HubOptions, find_source, quantize
from hybrid_rt import Engine
from hybrid_rt.calibration import MOST_TOKENS, Calibration, memory_bytes
from hybrid_rt.evaluate.windows import cut
from quant.checkpoint import Checkpoint
from quant.convert import Source, convert
from quant.errors import Dsr1Error, StoreError, UsageError
from quant.imatrix import Imatrix, llama_name
from quant.importance import AllAlike
from quant.inventory import TensorSpec
from quant.progress import Progress
from quant.report import read_report
from quant.shapes import known_shape
from quant.shards import Shards
from quant.store import Store
from tests.test_quantize import tree

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "".join(f"Line {number} says that {number * number} is the square of {number}.\n" for number in range(40))
LAYER, EXPERT = 2, 3


@pytest.fixture(scope="module")
def source(chat_folder: Path) -> Checkpoint:
    return Checkpoint.open(chat_folder)


def calibration(source: Checkpoint) -> Calibration:
    return Calibration(source, Path("text"), TEXT)


def spec(source: Checkpoint, name: str) -> TensorSpec:
    return source.inventory.by_name[name]


def seen_by(engine: Engine, modules: list[torch.nn.Module], windows: list[torch.Tensor]) -> list[list[Any]]:
    """What each module gave, chunk by chunk."""
    given: list[list[Any]] = [[] for _ in modules]
    handles = [
        module.register_forward_hook(lambda _m, args, output, kept=kept: kept.append((args, output)))
        for module, kept in zip(modules, given, strict=True)
    ]
    for window in windows:
        cache = engine.new_cache(len(window))
        for chunk in window.split(engine.prefill_chunk):
            engine.forward(chunk, cache, hooked=True)
    for handle in handles:
        handle.remove()
    return given


def test_mean_squares_are_those_of_a_plain_forward_pass(source: Checkpoint) -> None:
    engine = Engine.load(source.folder, dtype="float32", threads=1, pins=["chunk=512"])
    windows = cut(engine.tokenizer.encode(TEXT), engine.tokenizer.bos_id, min(512, source.config.max_seq_len))
    block = engine.transformer.layers[LAYER]
    norms, gates, wo = seen_by(engine, [block.ffn_norm, block.ffn.gate, block.attn.wo], windows)
    x = torch.cat([output for _, output in norms]).double()
    ids = torch.cat([output[0] for _, output in gates])
    own = x[(ids == EXPERT).any(-1)]
    prefix = f"layers.{LAYER}.ffn.experts.{EXPERT}"
    w1, w3 = (source.weight(f"{prefix}.{m}").dequantize(torch.float32).double() for m in ("w1", "w3"))
    hidden = F.silu(own @ w1.T) * (own @ w3.T)
    made = calibration(source)
    assert len(own) >= 32, "the expert must not be rare"
    for matrix, inputs in (("w1", own), ("w3", own), ("w2", hidden)):
        found = made.of(spec(source, f"{prefix}.{matrix}"))
        assert found is not None
        torch.testing.assert_close(found.double(), inputs.square().mean(0), rtol=1e-3, atol=1e-6)
    shared = made.of(spec(source, f"layers.{LAYER}.ffn.shared_experts.w1"))
    torch.testing.assert_close(shared, x.square().mean(0).float(), rtol=1e-3, atol=1e-6)
    heads = torch.cat([args[0] for args, _ in wo]).square().mean(0)
    torch.testing.assert_close(made.of(spec(source, f"layers.{LAYER}.attn.wo")), heads, rtol=1e-3, atol=1e-6)


def test_layers_run_once_when_they_are_asked_for(source: Checkpoint) -> None:
    done: list[str] = []
    made = Calibration(source, Path("text"), TEXT, lambda note: done.append(note) if "attention" in note else None)
    assert not done and made.of(spec(source, "layers.1.attn.wkv_b")) is not None
    assert [note.partition(" of ")[0] for note in done] == ["calibrating layer 1", "calibrating layer 2"]
    early = made.of(spec(source, "layers.0.ffn.w2"))
    assert early is not None and (early > 0).any() and len(done) == 2
    head = made.of(spec(source, "head"))
    assert head is not None and head.shape == (source.config.dim,) and len(done) == source.config.n_layers
    mtp = f"layers.{source.config.n_layers}"
    assert made.of(spec(source, f"{mtp}.attn.wo")) is None and made.of(spec(source, "embed")) is None
    assert made.summary().missing == 1  # the embedding is not packed


def test_the_command_tells_of_each_layer(
    source: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    quantize(str(source.folder), str(tmp_path / "store"), "fast", 1, True, calibrate=tmp_path / "text")
    told = capsys.readouterr()
    layers = source.config.n_layers
    notes = [line for line in told.err.splitlines() if line.startswith("calibrating layer")]
    assert notes == [f"calibrating layer {layer + 1} of {layers}" for layer in range(layers)]
    answer = json.loads(told.out)
    assert 0 < answer["converted_bytes"] <= answer["source_bytes"]


def test_a_rare_expert_gets_its_layer_s_figures(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_rt.calibration.LEAST_TOKENS", 0)
    own = calibration(source).of(spec(source, "layers.1.ffn.experts.0.w1"))
    monkeypatch.setattr("hybrid_rt.calibration.LEAST_TOKENS", 10**9)
    with pytest.raises(Dsr1Error, match="too few"):
        calibration(source)
    monkeypatch.setattr("hybrid_rt.calibration.LEAST_TOKENS", 0)
    made = calibration(source)
    monkeypatch.setattr("hybrid_rt.calibration.LEAST_TOKENS", 10**9)
    layers = [made.of(spec(source, f"layers.1.ffn.experts.{expert}.w1")) for expert in (0, 1)]
    assert torch.equal(layers[0], layers[1]) and not torch.equal(layers[0], own)
    assert made.summary().rare == made.summary().experts == source.config.n_routed_experts


def test_r1_s_calibration_fits_16_gib() -> None:
    shape = known_shape("deepseek-ai/DeepSeek-R1")
    assert shape is not None and 4 * 2**30 < memory_bytes(shape.config, MOST_TOKENS) < 16 * 2**30


def test_a_calibrated_store_is_nearer_in_what_counts(source: Checkpoint, tmp_path: Path) -> None:
    convert(source, tmp_path / "plain", "fast")
    convert(source, tmp_path / "calibrated", "fast", importance=calibration(source))
    convert(source, tmp_path / "again", "fast", importance=calibration(source))
    stores = [Store.open(tmp_path / name) for name in ("plain", "calibrated")]
    squares = calibration(source)
    errors = []
    for store in stores:
        total = 0.0
        for name in (f"layers.{LAYER}.ffn.experts.{expert}.w1" for expert in range(source.config.n_routed_experts)):
            off = store.weight(name).dequantize(torch.float32) - source.weight(name).dequantize(torch.float32)
            counts = squares.of(spec(source, name))
            assert counts is not None
            total += float((off.square() * counts).sum())
        errors.append(total)
    assert errors[1] < 0.98 * errors[0]
    files = [path.read_bytes() for path in sorted((tmp_path / "calibrated").iterdir())]
    assert files == [path.read_bytes() for path in sorted((tmp_path / "again").iterdir())]
    report = read_report(tmp_path / "calibrated")
    assert report is not None and report.calibration is not None and report.calibration.kind == "text"
    assert report.tensors[0].weighted_nmse is not None


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_stopped_conversion_continues_calibrated(source: Checkpoint, tmp_path: Path, share: float) -> None:
    """Layers that are converted already run again, so that those after them see the same."""

    def stop(step: Progress) -> None:
        if step.done > share * step.total:
            raise KeyboardInterrupt

    convert(source, tmp_path / "whole", "fast", importance=calibration(source))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "store", "fast", stop, calibration(source))
    with pytest.raises(StoreError, match="another calibration"):
        convert(source, tmp_path / "store", "fast")
    convert(source, tmp_path / "store", "fast", importance=calibration(source))
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")


def test_shards_in_any_order_are_calibrated_alike(source: Checkpoint, tmp_path: Path) -> None:
    turned = replace(source, shards=source.shards[::-1])
    assert len(turned.shards) > 1
    for name, checkpoint in (("store", source), ("turned", turned)):
        convert(Source(checkpoint, Shards(), "the same"), tmp_path / name, "fast", importance=calibration(source))
    assert tree(tmp_path / "store") == tree(tmp_path / "turned")


def test_what_the_command_refuses(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(find_importance(source, None, None), AllAlike)
    with pytest.raises(UsageError, match="cannot be given together"):
        find_importance(source, tmp_path, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UsageError, match="hf download some/model --local-dir"):
        find_source("some/model", tmp_path / "store", HubOptions(), calibrated=True)
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.setattr("cli.importance.usable_ram", lambda: 2**20)
    with pytest.raises(Dsr1Error, match="give a shorter text"):
        find_importance(source, tmp_path / "text", None)


# llama.cpp's files


def values_of(source: Checkpoint) -> dict[str, np.ndarray]:
    """Mean squares by llama.cpp's name: [matrices, columns]."""
    config, rng = source.config, np.random.default_rng(0)
    shapes = {"blk.1.ffn_gate_exps.weight": (config.n_routed_experts, config.dim), "output.weight": (1, config.dim)}
    return {name: rng.uniform(0, 9, shape).astype(np.float32) for name, shape in shapes.items()}


def old_file(path: Path, values: dict[str, np.ndarray], calls: int = 7) -> Path:
    data = struct.pack("<i", len(values))
    for name, means in values.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, means.size)
        data += (means * calls).astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", calls, 4) + b"text")
    return path


def gguf_file(path: Path, values: dict[str, np.ndarray], counts: dict[str, np.ndarray]) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["one", "two"])
    for name, means in values.items():
        writer.add_tensor(f"{name}.in_sum2", means * counts[name][:, None])
        writer.add_tensor(f"{name}.counts", counts[name][:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check(source: Checkpoint, made: Imatrix, values: dict[str, np.ndarray]) -> None:
    for name, expected in (
        ("layers.1.ffn.experts.3.w1", values["blk.1.ffn_gate_exps.weight"][3]),
        ("head", values["output.weight"][0]),
    ):
        found = made.of(spec(source, name))
        assert found is not None
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert made.of(spec(source, "layers.1.attn.wo")) is None and made.summary().missing == 1


def test_the_older_form(source: Checkpoint, tmp_path: Path) -> None:
    values = values_of(source)
    made = Imatrix(old_file(tmp_path / "x.dat", values))
    check(source, made, values)
    assert (made.summary().rare, made.summary().experts, made.summary().name) == (0, 1, "x.dat")


def test_gguf(source: Checkpoint, tmp_path: Path) -> None:
    values = values_of(source)
    counts = {name: np.full(len(means), 500, np.float32) for name, means in values.items()}
    counts["blk.1.ffn_gate_exps.weight"][0] = 2
    made = Imatrix(gguf_file(tmp_path / "x.gguf", values, counts))
    check(source, made, values)
    rare = made.of(spec(source, "layers.1.ffn.experts.0.w1"))
    stack, weights = values["blk.1.ffn_gate_exps.weight"], counts["blk.1.ffn_gate_exps.weight"]
    assert rare is not None and made.summary().rare == 1
    np.testing.assert_allclose(rare.numpy(), (stack * weights[:, None]).sum(0) / weights.sum(), rtol=1e-5)


def test_a_stopped_conversion_continues_with_an_importance_matrix(source: Checkpoint, tmp_path: Path) -> None:
    """Also its report, which tells of matrices that only the first run has asked for."""

    def stop(step: Progress) -> None:
        if step.done > 0.6 * step.total:
            raise KeyboardInterrupt

    path = old_file(tmp_path / "x.dat", values_of(source))
    convert(source, tmp_path / "whole", "fast", importance=Imatrix(path))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "store", "fast", stop, Imatrix(path))
    convert(source, tmp_path / "store", "fast", importance=Imatrix(path))
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")
    report = read_report(tmp_path / "store")
    assert report is not None and report.calibration is not None and report.calibration.missing > 0


def test_names(source: Checkpoint) -> None:
    of = {name: llama_name(found) for name, found in source.inventory.by_name.items()}
    assert of["layers.1.ffn.experts.2.w2"] == "blk.1.ffn_down_exps.weight"
    assert of["layers.1.ffn.shared_experts.w3"] == "blk.1.ffn_up_shexp.weight"
    assert (
        of["layers.0.ffn.w1"] == "blk.0.ffn_gate.weight" and of["layers.0.attn.wkv_a"] == "blk.0.attn_kv_a_mqa.weight"
    )
    assert of["embed"] == of["layers.0.attn_norm"] == of["layers.1.ffn.gate.weight"] == ""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty file"),
        (struct.pack("<i", 0), "empty"),
        (struct.pack("<i", -1), "-1 entries"),
        (struct.pack("<ii", 1, 10**9), "a name of"),
        (struct.pack("<ii", 1, 2) + b"ab" + struct.pack("<ii", 1, 2**30), "it ends where"),
        (struct.pack("<ii", 1, 2) + b"ab" + struct.pack("<ii", 0, 1), "0 calls"),
        (struct.pack("<ii", 1, 2) + b"ab" + struct.pack("<iif", 1, 1, -1.0), "no mean squares"),
        (b"GGUF" + struct.pack("<I", 9), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "entries"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "no sums"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "a name of"),
    ],
)
def test_files_that_are_no_importance_matrix(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(Dsr1Error, match=words):
        Imatrix(tmp_path / "x")


def test_another_model_s_importance_matrix(source: Checkpoint, tmp_path: Path) -> None:
    made = Imatrix(old_file(tmp_path / "x", {"output.weight": np.ones((1, source.config.dim + 1), np.float32)}))
    with pytest.raises(Dsr1Error, match="of this model"):
        made.of(spec(source, "head"))

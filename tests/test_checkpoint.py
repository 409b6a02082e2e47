import gc
import json
import os
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quant import safetensors_file
from quant.checkpoint import INDEX_NAME, Checkpoint
from quant.errors import CheckpointError, ConfigError, Dsr1Error
from quant.formats import BF16 as BF16_FORMAT
from quant.formats import F32, FP8_BLOCK
from quant.safetensors_file import DTYPES, SafetensorsFile
from tests.tiny_checkpoint import (
    BF16,
    NO_MTP,
    NO_Q_LORA,
    R1,
    RAGGED,
    Tensors,
    shard_name,
    tiny_config,
    tiny_shapes,
    tiny_tensors,
    write_checkpoint,
    write_files,
)

SMALL = {"hidden_size": 144, "intermediate_size": 48, "moe_intermediate_size": 48, "q_lora_rank": 48, "vocab_size": 32}
SMALL |= {"kv_lora_rank": 48, "n_routed_experts": 4, "n_group": 2, "num_experts_per_tok": 2, "num_hidden_layers": 2}
WQ_A = "model.layers.0.self_attn.q_a_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def no_values_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when anything maps a file: what a header shows to be wrong is refused before memory is spent."""

    def fail(path: Path, expected_bytes: int) -> None:
        pytest.fail(f"{path} was mapped")

    monkeypatch.setattr(safetensors_file, "_map_file", fail)


def refuse(action: Callable[[], Any], *words: str, error: type[Dsr1Error] = CheckpointError) -> None:
    """Require an error of one short line that says all of `words` and what to do."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 600
    assert "download" in message or "check" in message or "start again" in message or "supports only" in message, (
        message
    )


# A checkpoint as published


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("variant", [{}, RAGGED, BF16, NO_Q_LORA | NO_MTP], ids=["fp8", "ragged", "bf16", "no q_lora"])
def test_every_weight_is_what_was_written(tmp_path: Path, variant: dict, shards: int) -> None:
    tensors = tiny_tensors(tiny_config(variant), seed=3)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, variant, seed=3, shards=shards))
    assert len(checkpoint.shards) == shards
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for spec in checkpoint.inventory.tensors:
        weight = checkpoint.weight(spec.name)
        assert weight.shape == spec.shape == tuple(weight.data.shape)
        assert weight.format.name in spec.representations
        assert torch.equal(weight.data.view(torch.uint8), tensors.pop(spec.source).view(torch.uint8))
        assert (weight.scale is None) == (weight.format is not FP8_BLOCK)
        if weight.scale is not None:
            assert torch.equal(weight.scale, tensors.pop(spec.source + "_scale_inv"))
    assert not tensors


def test_formats_are_those_of_the_published_form(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path))
    assert checkpoint.weight("layers.0.attn.wq_a").format is FP8_BLOCK
    assert checkpoint.weight("layers.3.eh_proj").format is BF16_FORMAT
    assert checkpoint.weight("layers.1.ffn.gate.bias").format is F32
    assert list(checkpoint.mtp_layers) == [3]
    with pytest.raises(KeyError):
        checkpoint.weight("layers.9.attn.wo")


def test_scales_are_multipliers_of_their_blocks(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, RAGGED))
    weight = checkpoint.weight("layers.2.attn.wo")
    assert weight.scale is not None and weight.scale.shape == (2, 2) and weight.shape == (208, 144)
    expected = weight.data.float()
    for row in range(2):
        for column in range(2):
            rows, columns = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            expected[rows, columns] *= weight.scale[row, column]
    assert torch.equal(weight.dequantize(torch.float32), expected)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_checkpoint(tmp_path / name, SMALL, seed=5) for name in "ab")
    other = write_checkpoint(tmp_path / "c", SMALL, seed=6)
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes()
    assert (first / shard_name(0, 3)).read_bytes() != (other / shard_name(0, 3)).read_bytes()


def test_an_fp8_model_may_keep_linears_in_bf16(tmp_path: Path) -> None:
    def plain(tensors: Tensors) -> None:
        tensors[WQ_A] = tensors[WQ_A].to(torch.bfloat16)
        del tensors[WQ_A + "_scale_inv"]

    checkpoint = Checkpoint.open(changed(tmp_path, plain))
    assert checkpoint.weight("layers.0.attn.wq_a").format is BF16_FORMAT


def test_known_buffers_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    Checkpoint.open(changed(tmp_path, lambda tensors: tensors.update({name: torch.ones(8)})))


def test_mtp_layers_may_be_left_out_as_a_whole(tmp_path: Path) -> None:
    mtp = [name for name in tiny_shapes(tiny_config(SMALL)) if name.startswith("model.layers.2.")]

    def drop(names: list[str]) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            for name in names:
                tensors.pop(name)
                tensors.pop(name + "_scale_inv", None)

        return change

    checkpoint = Checkpoint.open(changed(tmp_path / "none", drop(mtp)))
    assert list(checkpoint.mtp_layers) == [] and checkpoint.config.n_mtp_layers == 0
    assert "layers.2.enorm" not in checkpoint.inventory.by_name
    refuse(lambda: Checkpoint.open(changed(tmp_path / "part", drop(mtp[1:]))), mtp[1].rsplit(".", 3)[0], "lacks")


# Mapping


def test_weights_are_views_of_the_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, shards=1))
    first, again = (checkpoint.weight("layers.1.ffn.experts.0.w1") for _ in "12")
    assert first.data.data_ptr() == again.data.data_ptr()


def test_writing_to_a_view_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, SMALL, shards=1) / "model.safetensors"
    before = path.read_bytes()
    SafetensorsFile.open(path).tensor("lm_head.weight").zero_()
    assert path.read_bytes() == before


def test_the_mapping_goes_with_its_last_view(tmp_path: Path) -> None:
    file = SafetensorsFile.open(write_checkpoint(tmp_path, SMALL, shards=1) / "model.safetensors")
    view = file.tensor("lm_head.weight")
    expected = view.clone()
    mapping: weakref.ref = file._mapping[0]
    del file
    gc.collect()
    assert mapping() is not None and torch.equal(view, expected)
    row = view[3]
    del view
    gc.collect()
    assert mapping() is not None and torch.equal(row, expected[3])
    del row
    gc.collect()
    assert mapping() is None


def test_unaligned_and_empty_tensors_are_read(tmp_path: Path) -> None:
    header = {"a": entry("U8", [3], 0, 3), "b": entry("F32", [2], 3, 11), "c": entry("BF16", [0, 4], 11, 11)}
    data = b"\1\2\3" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    file = SafetensorsFile.open(write_raw(tmp_path / "f", header, data))
    assert file.tensor("a").tolist() == [1, 2, 3]
    assert file.tensor("b").tolist() == [1.5, -2.0] and file.tensor("b").data_ptr() % 4 == 0
    assert file.tensor("c").shape == (0, 4) and file.tensor("c").dtype == torch.bfloat16


def test_every_type_reads_as_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        data = torch.arange(6).to(dtype).reshape(2, 3)
        save_file({"x": data}, tmp_path / name)
        ours = SafetensorsFile.open(tmp_path / name)
        assert ours.spec("x").dtype == name and list(ours.names()) == ["x"]
        assert torch.equal(ours.tensor("x").view(torch.uint8), load_file(tmp_path / name)["x"].view(torch.uint8))


def test_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, SMALL, shards=1) / "model.safetensors"
    file = SafetensorsFile.open(path)
    os.truncate(path, path.stat().st_size - 1)
    refuse(lambda: file.tensor("lm_head.weight"), str(path), "changed")
    path.unlink()
    refuse(lambda: file.tensor("lm_head.weight"), str(path), "cannot be mapped")


def test_r1_is_opened_from_its_headers_alone(tmp_path: Path) -> None:
    """163 shards of 689 GB, all holes: only the headers exist."""
    write_sparse_r1(tmp_path, shards=163)
    start, before = time.perf_counter(), resident_bytes()
    checkpoint = Checkpoint.open(tmp_path)
    assert time.perf_counter() - start < 20  # 2 s when nothing else runs
    assert resident_bytes() - before < 400 * 2**20
    assert len(checkpoint.shards) == 163 and checkpoint.nbytes > 680e9
    before = resident_bytes()
    weight = checkpoint.weight("layers.61.ffn.experts.255.w2")
    assert weight.shape == (7168, 2048) and weight.scale is not None and weight.scale.shape == (56, 16)
    assert resident_bytes() - before < 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_sparse_r1(folder: Path, shards: int) -> None:
    fields = tiny_config(R1)
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    for name, (kind, shape, _) in tiny_shapes(fields).items():
        dtype, width = {"linear": ("F8_E4M3", 1), "router_bias": ("F32", 4)}.get(kind, ("BF16", 2))
        entries.append((name, dtype, shape, width))
        if kind == "linear":
            entries.append((f"{name}_scale_inv", "F32", (-(-shape[0] // 128), -(-shape[1] // 128)), 4))
    weight_map = {}
    for number in range(shards):
        header, end = {}, 0
        for name, dtype, shape, width in entries[number::shards]:
            begin, end = end, end + width * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = entry(dtype, list(shape), begin, end)
            weight_map[name] = shard_name(number, shards)
        path = write_raw(folder / shard_name(number, shards), header)
        os.truncate(path, path.stat().st_size + end)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(fields))


# Files that are damaged


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file of any header: JSON text, or something to write as such."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


X = entry("F32", [2, 2], 0, 16)
LIES: dict[str, tuple[Any, int, tuple[str, ...]]] = {
    "overlap": ({"x": X, "y": entry("F32", [4], 12, 28)}, 28, ("'y'", "overlaps")),
    "the same place twice": ({"x": X, "y": X}, 16, ("'y'", "overlaps")),
    "hole": ({"x": X, "y": entry("F32", [4], 20, 36)}, 36, ("'y'", "hole")),
    "hole in front": ({"x": entry("F32", [4], 4, 20)}, 20, ("'x'", "hole")),
    "out of the file": ({"x": entry("F32", [1024], 0, 4096)}, 16, ("'x'", "4096", "16")),
    "truncated": ({"x": X, "y": entry("F32", [4], 16, 32)}, 31, ("'y'", "32", "31")),
    "surplus": ({"x": X}, 20, ("20", "16")),
    "data without tensors": ({}, 4, ("4 bytes",)),
    "negative offset": ({"x": entry("F32", [4], -16, 0)}, 16, ("'x'", "data_offsets")),
    "reversed offsets": ({"x": entry("F32", [4], 16, 0)}, 16, ("'x'", "data_offsets")),
    "huge offset": ({"x": entry("F32", [4], 2**70, 2**70 + 16)}, 16, ("'x'", "data_offsets")),
    "fractional offset": ({"x": entry("F32", [4], 0, 16.0)}, 16, ("'x'", "data_offsets")),
    "three offsets": ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, 16, ("'x'", "data_offsets")),
    "size against shape": ({"x": entry("F32", [3, 2], 0, 16)}, 16, ("'x'", "24 bytes")),
    "negative shape": ({"x": entry("F32", [-2, -2], 0, 16)}, 16, ("'x'", "shape")),
    "huge shape": ({"x": entry("F32", [2**40, 2**40], 0, 16)}, 16, ("'x'", "shape")),
    "huge and empty shape": ({"x": entry("F32", [0, 2**62, 2**62], 0, 0)}, 0, ("'x'", "shape")),
    "too many dimensions": ({"x": entry("F32", [1] * 65 + [4], 0, 16)}, 16, ("'x'", "shape")),
    "true as a size": ({"x": entry("F32", [True, 4], 0, 16)}, 16, ("'x'", "shape")),
    "text as a shape": ({"x": entry("F32", "4", 0, 16)}, 16, ("'x'", "shape")),
    "unknown type": ({"x": entry("F31", [4], 0, 16)}, 16, ("'x'", "'F31'")),
    "no type": ({"x": entry(None, [4], 0, 16)}, 16, ("'x'", "None")),
    "missing field": ({"x": {"dtype": "F32", "shape": [4]}}, 16, ("'x'", "fields")),
    "further field": ({"x": X | {"strides": [1]}}, 16, ("'x'", "fields")),
    "not an object inside": ({"x": 3}, 16, ("'x'", "fields")),
    "not an object": ([], 0, ("not a JSON object",)),
    "not JSON": (b"{oops", 0, ("header cannot be read",)),
    "not UTF-8": (b'{"\xff": 1}', 0, ("header cannot be read",)),
    "UTF-16": ('{"x": 1}'.encode("utf-16"), 0, ("header cannot be read",)),
    "deep": (b'{"x":' + b"[" * 100_000, 0, ("header cannot be read", "deep")),
    "a number too long": (b'{"x": ' + b"9" * 10_000 + b"}", 0, ("header cannot be read",)),
    "a key twice": (b'{"x": {}, "y": {}, "x": {}}', 0, ("'x' stands twice",)),
    "a lone surrogate": (b'{"\\ud800": 1}', 0, ("'\\ud800'",)),
}


@pytest.mark.parametrize(("header", "size", "words"), LIES.values(), ids=LIES)
@pytest.mark.usefixtures("no_values_read")
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, size: int, words: tuple[str, ...]) -> None:
    path = write_raw(tmp_path / "model-00001-of-00002.safetensors", header, bytes(size))
    refuse(lambda: SafetensorsFile.open(path), str(path), *words)


@pytest.mark.parametrize("length", [2, 2**20, 100_000_001, 2**40, 2**63, 2**64 - 1])
def test_a_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(length.to_bytes(8, "little") + b'{"x":')
    os.truncate(path, 2**31 if length == 100_000_001 else 13)
    before = resident_bytes()
    refuse(lambda: SafetensorsFile.open(path), str(path), "header")
    assert resident_bytes() - before < 2**20


def test_each_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(2, 2), "other": torch.ones(3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:size])
        refuse(lambda: SafetensorsFile.open(tmp_path / "f"), str(tmp_path / "f"), "download this file again")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    refuse(lambda: SafetensorsFile.open(tmp_path / "none"), str(tmp_path / "none"), "missing")
    (tmp_path / "folder").mkdir()
    refuse(lambda: SafetensorsFile.open(tmp_path / "folder"), str(tmp_path / "folder"), "cannot be read")


def open_or_refuse(content: bytes) -> None:
    """Any bytes are a valid file, all of whose tensors can be read, or a CheckpointError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        path.write_bytes(content)
        try:
            file = SafetensorsFile.open(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            return
        tensors = [file.tensor(name) for name in file.names()]
        assert sum(tensor.nbytes for tensor in tensors) == file.nbytes
        assert all(tensor.view(-1).view(torch.uint8).numel() == tensor.nbytes for tensor in tensors)


WHOLE = json.dumps(
    {"__metadata__": {"format": "pt"}, "a": entry("F8_E4M3", [3], 0, 3), "b": entry("F32", [1, 2], 3, 11)}
)
WHOLE_FILE = len(WHOLE).to_bytes(8, "little") + WHOLE.encode() + bytes(range(11))


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(WHOLE_FILE) - 1), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 4),
)
def test_changed_bytes_are_read_or_refused(edits: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(WHOLE_FILE)
    for place, byte in edits:
        content[place] = byte
    open_or_refuse(bytes(content[: len(content) - cut]))


NUMBERS: st.SearchStrategy[Any] = st.integers(-2, 24) | st.sampled_from(
    [2**31, 2**62, 2**63, 2**64, -(2**63), 1.5, True, None, "1", []]
)
FIELDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F8_E8M0", "", None, 3, []]),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | NUMBERS,
    }
)
ENTRIES = FIELDS | st.none() | st.dictionaries(st.text(max_size=4), st.integers(), max_size=2)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.text(max_size=6), ENTRIES, max_size=3), data=st.binary(max_size=40))
def test_made_up_headers_are_read_or_refused(header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    open_or_refuse(len(text).to_bytes(8, "little") + text + data)


@settings(max_examples=100, deadline=None)
@given(shapes=st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=4))
def test_every_valid_header_is_read(shapes: list[tuple[str, list[int]]]) -> None:
    header, end = {}, 0
    for number, (dtype, shape) in enumerate(shapes):
        begin, end = end, end + torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[f"t{number}"] = entry(dtype, shape, begin, end)
    with tempfile.TemporaryDirectory() as folder:
        file = SafetensorsFile.open(write_raw(Path(folder) / "f", header, bytes(end)))
        for number, (dtype, shape) in enumerate(shapes):
            tensor = file.tensor(f"t{number}")
            assert list(tensor.shape) == shape and tensor.dtype == DTYPES[dtype]


# Checkpoints that are incomplete or of another model


def changed(folder: Path, change: Callable[[Tensors], Any], shards: int = 3, **fields: Any) -> Path:
    """A small checkpoint whose tensors (and config.json) were changed before it was written."""
    tensors = tiny_tensors(tiny_config(SMALL))
    change(tensors)
    write_files(folder, tiny_config(SMALL) | fields, tensors, shards)
    return folder


def replace(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def add(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.ones(1, 1)})


FAULTS: dict[str, tuple[Callable[[Tensors], Any], tuple[str, ...]]] = {
    "scale absent": (drop(EXPERT + "_scale_inv"), (EXPERT, "scales", "missing", ".safetensors")),
    "scale of another shape": (
        replace(WQ_A + "_scale_inv", lambda scale: scale[:, :1].clone()),
        (WQ_A + "_scale_inv", "(1, 1)", "(1, 2)", ".safetensors"),
    ),
    "scale of another type": (
        replace(WQ_A + "_scale_inv", lambda scale: scale.bfloat16()),
        (WQ_A + "_scale_inv", "BF16", "F32", ".safetensors"),
    ),
    "scale of a bf16 weight": (
        replace(WQ_A, lambda weight: weight.to(torch.bfloat16)),
        (WQ_A + "_scale_inv", "not FP8", ".safetensors"),
    ),
    "scale of nothing": (add("model.layers.0.mlp.who.weight_scale_inv"), ("mlp.who", "does not have", ".safetensors")),
    "unknown tensor": (add("model.layers.0.self_attn.k_proj.weight"), ("k_proj", "does not have", ".safetensors")),
    "unknown layer": (add("model.layers.9.input_layernorm.weight"), ("layers.9", "does not have", ".safetensors")),
    "layer written otherwise": (add("model.layers.00.input_layernorm.weight"), ("layers.00", "does not have")),
    "a strange layer": (add("model.layers.٣." + "9" * 50), ("does not have", ".safetensors")),
    "missing tensor": (drop("model.layers.1.input_layernorm.weight"), ("layers.1.input_layernorm", "lacks 1")),
    "missing head": (drop("lm_head.weight"), ("lm_head.weight", "lacks 1")),
    "another shape": (
        replace("model.norm.weight", lambda weight: weight[1:].clone()),
        ("model.norm.weight", "(143,)", "(144,)", ".safetensors"),
    ),
    "transposed": (replace(WQ_A, lambda weight: weight.T.contiguous()), (WQ_A, "(144, 48)", "(48, 144)")),
    "another type": (replace(WQ_A, lambda weight: weight.to(torch.float16)), (WQ_A, "F16", "F8_E4M3 or BF16")),
    "a norm in FP8": (
        replace("model.norm.weight", lambda weight: weight.to(torch.float8_e4m3fn)),
        ("model.norm.weight", "F8_E4M3", "BF16 or F32"),
    ),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("change", "words"), FAULTS.values(), ids=FAULTS)
@pytest.mark.usefixtures("no_values_read")
def test_wrong_tensors_are_named(
    tmp_path: Path, change: Callable[[Tensors], Any], words: tuple[str, ...], shards: int
) -> None:
    changed(tmp_path, change, shards)
    refuse(lambda: Checkpoint.open(tmp_path), str(tmp_path), *words)


@pytest.mark.usefixtures("no_values_read")
def test_fp8_weights_without_quantization_config_are_refused(tmp_path: Path) -> None:
    changed(tmp_path, lambda tensors: None, quantization_config=None)
    refuse(lambda: Checkpoint.open(tmp_path), "F8_E4M3", "BF16 or F32", ".safetensors")


@pytest.mark.usefixtures("no_values_read")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "deepseek_v2"}, ("'deepseek_v2'",)),
        ({"model_type": "llama"}, ("'llama'",)),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("'gptq'", "supports only")),
        (
            {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}},
            ("[64, 64]", "supports only"),
        ),
    ],
)
def test_unsupported_models_are_refused(tmp_path: Path, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    changed(tmp_path, lambda tensors: None, **fields)
    with pytest.raises(ConfigError) as caught:
        Checkpoint.open(tmp_path)
    assert all(word in str(caught.value) for word in (str(tmp_path / "config.json"), *words))


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, SMALL)


@pytest.mark.usefixtures("no_values_read")
def test_a_missing_shard_is_named_with_one_of_its_tensors(folder: Path) -> None:
    (folder / shard_name(1, 3)).unlink()
    refuse(lambda: Checkpoint.open(folder), str(folder / shard_name(1, 3)), "model.layers.", "missing", "download")


@pytest.mark.usefixtures("no_values_read")
def test_a_truncated_shard_is_named_with_a_tensor(folder: Path) -> None:
    path = folder / shard_name(2, 3)
    os.truncate(path, path.stat().st_size - 4096)
    refuse(lambda: Checkpoint.open(folder), str(path), "'", "download this file again")


def test_a_folder_without_weights_says_so(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    refuse(lambda: Checkpoint.open(folder), str(folder), INDEX_NAME, "model.safetensors")


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/../../x", "", "a\\b", "a\0b", 3, None])
def test_the_index_cannot_point_outside_of_the_folder(folder: Path, file: Any) -> None:
    edit_index(folder, lambda weight_map: weight_map.update({WQ_A: file}))
    refuse(lambda: Checkpoint.open(folder), str(folder / INDEX_NAME), WQ_A, repr(file), "not a file of this folder")


def test_index_and_headers_must_agree(folder: Path) -> None:
    original = (folder / INDEX_NAME).read_text()
    place = json.loads(original)["weight_map"][WQ_A]
    other = next(shard_name(i, 3) for i in range(3) if shard_name(i, 3) != place)
    edit_index(folder, lambda weight_map: weight_map.update({WQ_A: other}))
    refuse(lambda: Checkpoint.open(folder), str(folder / other), WQ_A, "lacks")
    (folder / INDEX_NAME).write_text(original)
    edit_index(folder, lambda weight_map: weight_map.pop(WQ_A))
    refuse(lambda: Checkpoint.open(folder), str(folder / place), WQ_A, "does not place there")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}, "weight_map": {}}'])
def test_a_damaged_index_is_named(folder: Path, content: bytes) -> None:
    (folder / INDEX_NAME).write_bytes(content)
    refuse(lambda: Checkpoint.open(folder), str(folder / INDEX_NAME), "download this file again")


def test_links_into_a_download_cache_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    blobs = tmp_path_factory.mktemp("blobs")
    for file in list(folder.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert Checkpoint.open(str(folder)).weight("embed").shape == (32, 144)

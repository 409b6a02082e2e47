"""GGUF files, read back by the gguf package. llama.cpp itself reads them in `python -m benchmarks.llama_check`."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hybrid_rt.models import NANO_R1
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import CheckpointError, ConfigError, Dsr1Error, StoreError, TokenizerError
from quant.export.gguf import export_gguf
from quant.export.gguf_tensors import GgufRecipe, find_recipe, model_tensors
from quant.export.source import StoreRows, open_source
from quant.inventory import Inventory
from quant.packed import FAST, Q8
from quant.packing import decode
from quant.pieces import Piece, cuts
from quant.progress import Progress
from quant.shard_reader import ShardReader
from quant.shards import Shards
from quant.store import Store
from quant.tensor_rows import Scratch, float_rows, published_rows, rows_span, scale_rows_span
from tests.tiny_checkpoint import BF16, NO_MTP, NO_Q_LORA, R1, RAGGED, tiny_config, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
Floats = NDArray[np.float32]


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO_R1 / name, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(with_tokenizer(write_checkpoint(tmp_path_factory.mktemp("source"), seed=3)))


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """48 keys in a head and rows of 80, 144 and 208: no multiple of 256, some none of 32. A vocabulary to be padded."""
    fields = RAGGED | BF16 | NO_Q_LORA | {"vocab_size": 520}
    return Checkpoint.open(with_tokenizer(write_checkpoint(tmp_path_factory.mktemp("ragged"), fields)))


def export(source: Any, path: Path, recipe: str) -> gguf.GGUFReader:
    export_gguf(source, path, find_recipe(recipe))
    return gguf.GGUFReader(path)


def tensors_of(reader: gguf.GGUFReader) -> dict[str, Floats]:
    """Name → values, rows before columns."""
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def fields_of(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def values(source: Checkpoint, name: str) -> Floats:
    return source.weight(name).dequantize(torch.float32).numpy()


def error(x: Floats, y: Floats) -> float:
    return float(((y - x) ** 2).sum() / (x**2).sum())


def expected(source: Checkpoint) -> dict[str, Floats]:
    """llama.cpp's tensors, put together by hand; of the layers only 0, which is dense, and 2."""
    c = source.config
    told = {"token_embd.weight": values(source, "embed"), "output.weight": values(source, "head")}
    told["output_norm.weight"] = values(source, "norm")
    for layer in (0, 2):
        names = {"attn_norm": "attn_norm", "attn_kv_a_mqa": "attn.wkv_a", "attn_kv_a_norm": "attn.kv_norm"}
        names |= {"attn_output": "attn.wo", "ffn_norm": "ffn_norm"}
        query = {"attn_q_a": "attn.wq_a", "attn_q_a_norm": "attn.q_norm", "attn_q_b": "attn.wq_b"}
        names |= query if c.q_lora_rank else {"attn_q": "attn.wq"}
        ours, suffix = ("ffn", "") if not source.config.is_moe(layer) else ("ffn.shared_experts", "_shexp")
        names |= {f"ffn_{name}{suffix}": f"{ours}.w{i}" for name, i in (("gate", 1), ("down", 2), ("up", 3))}
        told |= {f"blk.{layer}.{name}.weight": values(source, f"layers.{layer}.{our}") for name, our in names.items()}
        kv = values(source, f"layers.{layer}.attn.wkv_b").reshape(c.n_heads, -1, c.kv_lora_rank)
        told[f"blk.{layer}.attn_k_b.weight"] = kv[:, : c.qk_nope_head_dim].transpose(0, 2, 1)
        told[f"blk.{layer}.attn_v_b.weight"] = kv[:, c.qk_nope_head_dim :]
    for name, i in (("gate", 1), ("down", 2), ("up", 3)):
        experts = [values(source, f"layers.2.ffn.experts.{e}.w{i}") for e in range(c.n_routed_experts)]
        told[f"blk.2.ffn_{name}_exps.weight"] = np.stack(experts)
    told["blk.2.ffn_gate_inp.weight"] = values(source, "layers.2.ffn.gate.weight")
    told["blk.2.exp_probs_b.bias"] = values(source, "layers.2.ffn.gate.bias")
    return told


@pytest.mark.parametrize(("recipe", "bound"), [("q8_0", 6e-5), ("q4_0", 0.011), ("q4_k", 0.0085)])
def test_every_tensor_holds_the_checkpoint_s_values(
    checkpoint: Checkpoint, ragged: Checkpoint, tmp_path: Path, recipe: str, bound: float
) -> None:
    for source in (checkpoint, ragged):
        path = tmp_path / f"{source.folder.name}.gguf"
        reader = export(source, path, recipe)
        written, told = tensors_of(reader), expected(source)
        assert told.keys() == {name for name in written if not name.startswith("blk.1.")}
        for name, value in told.items():
            assert written[name].shape == value.shape, name
            assert error(value, written[name]) < bound, name
            if value.ndim == 1 or "gate_inp" in name:
                np.testing.assert_array_equal(written[name], value)
        assert path.stat().st_size == len(reader.data)


def test_types_of_a_mixture() -> None:
    """Of R1, with q4_k, as llama.cpp's quantiser chooses for Q4_K_M in w2 and the head."""
    from quant.config import parse_config

    config = parse_config(tiny_config(R1))
    types = {tensor.name: tensor.type.name for tensor in model_tensors(Inventory.of(config), find_recipe("q4_k"))}
    assert len(types) == 3 + 61 * 10 + 3 * 3 + 58 * 8 and not any(name.startswith("blk.61") for name in types)
    assert (
        types["output.weight"] == "Q6_K" and types["token_embd.weight"] == types["blk.9.attn_output.weight"] == "Q4_K"
    )
    assert types["blk.5.attn_k_b.weight"] == "Q5_0"  # rows of 128
    assert types["blk.5.ffn_gate_inp.weight"] == types["blk.5.exp_probs_b.bias"] == types["output_norm.weight"] == "F32"
    downs = [types[f"blk.{layer}.ffn_down{'_exps' if layer > 2 else ''}.weight"] for layer in range(61)]
    larger = [layer for layer, name in enumerate(downs) if name == "Q6_K"]
    assert larger == [*range(7), *range(9, 53, 3), *range(53, 61)]


def test_fields_are_those_of_the_config(checkpoint: Checkpoint, ragged: Checkpoint, tmp_path: Path) -> None:
    fields = fields_of(export(checkpoint, tmp_path / "model-name.gguf", "q8_0"))
    told = {key.removeprefix("deepseek2."): value for key, value in fields.items() if key.startswith("deepseek2.")}
    assert fields["general.architecture"] == "deepseek2" and fields["general.name"] == "model-name"
    assert fields["general.file_type"] == 7 and fields["general.quantization_version"] == 2
    assert told == {
        "block_count": 3,
        "context_length": 2560,
        "embedding_length": 256,
        "feed_forward_length": 384,
        "vocab_size": 512,
        "leading_dense_block_count": 1,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.q_lora_rank": 128,
        "attention.kv_lora_rank": 128,
        "attention.key_length": 144,
        "attention.value_length": 128,
        "attention.key_length_mla": 48,
        "attention.value_length_mla": 32,
        "expert_count": 16,
        "expert_used_count": 4,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 128,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.1),
    }
    assert fields_of(export(ragged, tmp_path / "ragged.gguf", "q8_0"))["deepseek2.attention.q_lora_rank"] == 0


# The tokenizer


def test_the_tokenizer_of_nano_r1(ragged: Checkpoint, tmp_path: Path) -> None:
    fields = fields_of(export(ragged, tmp_path / "model.gguf", "q8_0"))
    published = json.loads((NANO_R1 / "tokenizer.json").read_text())
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert {text: i for i, text in enumerate(tokens[:512])} == published["model"]["vocab"]
    assert tokens[512:] == [f"[PAD{i}]" for i in range(512, 520)] and types[512:] == [gguf.TokenType.UNUSED] * 8
    assert types[:9] == [gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.USER_DEFINED] * 2 + [
        gguf.TokenType.CONTROL,
        gguf.TokenType.NORMAL,
    ]
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "llama-bpe"
    assert fields["tokenizer.ggml.merges"] == []
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert fields["tokenizer.ggml.padding_token_id"] == 2 and fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"].startswith("{{ bos_token }}")


def test_the_tokenizer_of_r1(r1_folder: Path) -> None:
    from quant.export.gguf_tokenizer import tokenizer_fields

    fields = tokenizer_fields(r1_folder, 129280)
    published = json.loads((r1_folder / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.pre"] == "deepseek-v3"
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 129280
    assert fields["tokenizer.ggml.merges"] == published["model"]["merges"]
    numbers = {token["content"]: token["id"] for token in published["added_tokens"]}
    types = fields["tokenizer.ggml.token_type"]
    assert types[numbers["<｜User｜>"]] == gguf.TokenType.CONTROL
    assert types[numbers["<think>"]] == gguf.TokenType.USER_DEFINED


def damage_tokenizer(folder: Path, change: Any) -> None:
    fields = json.loads((folder / "tokenizer.json").read_text())
    change(fields)
    (folder / "tokenizer.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields["pre_tokenizer"]["pretokenizers"].pop(0), "not that of DeepSeek-V3"),
        (lambda fields: fields["model"].update(type="Unigram"), "not that of DeepSeek-V3"),
        (lambda fields: fields["model"].pop("vocab"), "damaged"),
        (lambda fields: fields["added_tokens"].append(7), "damaged"),
        (lambda fields: fields["added_tokens"][4].update(content="\ud800"), "damaged"),
        (lambda fields: fields["model"]["vocab"].update(more=512), "512"),
    ],
)
def test_other_tokenizers_are_refused(checkpoint: Checkpoint, tmp_path: Path, change: Any, message: str) -> None:
    folder = tmp_path / "source"
    shutil.copytree(checkpoint.folder, folder)
    damage_tokenizer(folder, change)
    with pytest.raises(TokenizerError, match=message):
        export(Checkpoint.open(folder), tmp_path / "model.gguf", "q8_0")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="no tokenizer.json"):
        export(Checkpoint.open(folder), tmp_path / "model.gguf", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Stores


@pytest.mark.parametrize(("recipe", "target", "fmt", "bound"), [("fast", "q4_0", FAST, 2**-11), ("q8", "q8_0", Q8, 0)])
def test_a_store_s_codes_are_taken_over(
    checkpoint: Checkpoint, tmp_path: Path, recipe: str, target: str, fmt: Any, bound: float
) -> None:
    """All but the scales' rounding to half precision: none for `q8`, whose scales it holds; a 2048th for `fast`."""
    convert(checkpoint, tmp_path / "store", recipe)
    store = Store.open(tmp_path / "store")
    exported = export_gguf(store, tmp_path / "model.gguf", find_recipe(target))
    written = tensors_of(gguf.GGUFReader(tmp_path / "model.gguf"))
    for name, ours in (("blk.0.ffn_down", "layers.0.ffn.w2"), ("blk.2.attn_output", "layers.2.attn.wo")):
        weight = store.weight(ours, fmt.name)
        stored = decode(weight.data.numpy(), fmt, weight.shape)
        np.testing.assert_allclose(written[f"{name}.weight"], stored, rtol=bound, atol=0)
    for expert in (0, 15):
        weight = store.weight(f"layers.1.ffn.experts.{expert}.w1")
        stored = decode(weight.data.numpy(), fmt, weight.shape)
        np.testing.assert_allclose(written["blk.1.ffn_gate_exps.weight"][expert], stored, rtol=bound, atol=0)
    # embedding, head and the matrices of keys and values are encoded anew
    c = checkpoint.config
    anew = 2 * c.vocab_size * c.dim if target == "q4_0" else c.vocab_size * c.dim
    anew += 3 * c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    assert exported.encoded == anew and exported.taken > anew


def test_a_store_of_other_codes_is_decoded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "store", "balanced")
    exported = export_gguf(open_source(tmp_path / "store"), tmp_path / "model.gguf", find_recipe("q4_k"))
    assert exported.taken == 256 * 128  # w2 of a shared expert, for which Q8_0 stands in as its rows are short
    written = tensors_of(gguf.GGUFReader(tmp_path / "model.gguf"))
    for name, value in expected(checkpoint).items():
        assert error(value, written[name]) < 0.018, name  # two errors of 4 bits each


# Rows


@pytest.mark.parametrize("name", ["layers.0.ffn.w1", "layers.1.attn.wkv_b", "head"])
def test_rows_are_those_of_the_whole(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    """Of FP8, bf16 and packed weights, in pieces that begin anywhere in a tensor."""
    convert(checkpoint, tmp_path / "store", "q8")
    store = Store.open(tmp_path / "store")
    for source, rows in ((checkpoint, checkpoint), (store, StoreRows(store, {}))):
        whole = source.weight(name).dequantize(torch.float32)
        for first in (0, 128):
            shape = (min(128, len(whole) - first), whole.shape[1])
            piece, scratch = Piece(source.inventory.by_name[name], first, shape, ()), Scratch()
            span, scales = rows_span(rows, piece), scale_rows_span(rows, piece)
            shard = next(shard for shard in rows.shards if shard.path == span.path)
            found = None if scales is None else Shards().read(scales, scales.path.stat().st_size)
            published = published_rows(rows, piece, ShardReader(shard.path, shard.file_bytes), found, scratch)
            assert torch.equal(float_rows(published, scratch), whole[first : first + 128])


def test_large_matrices_are_cut() -> None:
    ranges = [(first, first + shape[0]) for first, shape in cuts((129280, 7168))]
    assert ranges[0] == (0, 512) and ranges[-1][1] == 129280
    assert all(start % 128 == 0 and stop - start <= 512 for start, stop in ranges)
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    heads = [(first, shape[0]) for first, shape in cuts((128 * 320, 512), 320)]
    assert all(first % 320 == first % 128 == 0 == rows % 320 for first, rows in heads)
    assert sum(rows for _, rows in heads) == 128 * 320 and len(heads) > 1


# What goes wrong


def test_only_whole_files_appear(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    class StopError(Exception):
        pass

    def stop(step: Progress) -> None:
        if step.done > step.total // 2:
            raise StopError

    with pytest.raises(StopError):
        export_gguf(checkpoint, path, find_recipe("q8_0"), stop)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf.part"]
    with pytest.raises(StoreError, match="another recipe"):
        export_gguf(checkpoint, path, find_recipe("q4_0"))
    steps: list[Progress] = []
    export_gguf(checkpoint, path, find_recipe("q8_0"), steps.append)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"] and steps[-1].done == steps[-1].total
    assert steps[0].done > steps[0].total // 3  # what was done was not done again
    first = path.read_bytes()
    with pytest.raises(StoreError, match="exists"):
        export_gguf(checkpoint, path, find_recipe("q8_0"))
    path.unlink()
    export_gguf(checkpoint, path, find_recipe("q8_0"))
    assert path.read_bytes() == first


def test_killed_just_before_it_has_its_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path, work = tmp_path / "model.gguf", tmp_path / "model.gguf.part"
    export_gguf(checkpoint, path, find_recipe("q8_0"))
    first = path.read_bytes()
    work.mkdir()
    path.rename(work / path.name)
    export_gguf(checkpoint, path, find_recipe("q8_0"))
    assert path.read_bytes() == first and not work.exists()
    work.mkdir()  # after it has its name
    with pytest.raises(StoreError, match="exists"):
        export_gguf(checkpoint, path, find_recipe("q8_0"))
    assert not work.exists()


def test_a_full_disk_is_told_before(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    with pytest.raises(StoreError, match="the file takes .* and the disk of .* has .* free, .* too little"):
        export(checkpoint, tmp_path / "model.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_scaling": {**tiny_config()["rope_scaling"], "mscale": 0.5}}, "mscale"),
        ({"rope_theta": 1e300}, "1e\\+300"),
        ({"num_hidden_layers": 27, "n_routed_experts": 4, "n_group": 2, "num_experts_per_tok": 1}, "27 layers"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(tmp_path: Path, overrides: Any, message: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "vocab_size": 8} | NO_MTP
    source = Checkpoint.open(write_checkpoint(tmp_path / "source", small | overrides))
    with pytest.raises(ConfigError, match=message):
        export(source, tmp_path / "model.gguf", "q8_0")


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    from tests.tiny_checkpoint import tiny_tensors, write_files

    fields = tiny_config(BF16 | NO_MTP)
    tensors = tiny_tensors(fields)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][5, 6] = float("nan")
    write_files(tmp_path / "source", fields, tensors)
    source = Checkpoint.open(with_tokenizer(tmp_path / "source"))
    with pytest.raises(CheckpointError, match="experts.3.up_proj.*download"):
        export(source, tmp_path / "model.gguf", "q8_0")
    assert not (tmp_path / "model.gguf").exists()


def test_other_names_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for path in (tmp_path / "model", tmp_path / "missing" / "model.gguf"):
        with pytest.raises(Dsr1Error, match="give"):
            export(checkpoint, path, "q8_0")
    with pytest.raises(StoreError, match="q4_0, q4_k, q8_0"):
        find_recipe("q5")
    assert isinstance(find_recipe("q4_k"), GgufRecipe)

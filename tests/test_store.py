import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quant import convert as convert_module
from quant.checkpoint import Checkpoint
from quant.config import parse_config
from quant.convert import convert
from quant.encoding import encode
from quant.errors import Dsr1Error, StoreError
from quant.files import sha256_of
from quant.inventory import Inventory
from quant.journal import JOURNAL_NAME
from quant.manifest import MANIFEST_NAME, FileRecord, read_manifest
from quant.packed import ACCURATE, FAST, PACKED_FORMATS, Q8
from quant.packing import decode
from quant.recipes import RECIPES, find_recipe
from quant.safetensors_file import SafetensorsFile
from quant.safetensors_writer import FilePlan, NewTensor, write_safetensors
from quant.store import Store, is_store
from quant.store_formats import LINEARS, representations, stored_bytes
from quant.store_layout import METADATA, layer_file, plan_store
from tests.tiny_checkpoint import BF16, R1, TINY, Tensors, tiny_config, tiny_tensors, write_checkpoint, write_files

pytestmark = pytest.mark.usefixtures("one_thread")

# Matrices of 1 and of 2 strips (rows of 128 and 16), no dimension a multiple of 128 but one
SMALL = {"hidden_size": 144, "intermediate_size": 48, "moe_intermediate_size": 48, "q_lora_rank": 48, "vocab_size": 32}
SMALL |= {"kv_lora_rank": 48, "n_routed_experts": 4, "n_group": 2, "num_experts_per_tok": 2, "num_hidden_layers": 2}
MOE_FILE, RECORDS = "layer-001.safetensors", "layers.1.ffn.experts"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in `source` and its store in `store`."""
    folder = tmp_path_factory.mktemp("made")
    convert(Checkpoint.open(write_checkpoint(folder / "source", SMALL)), folder / "store")
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made / "store", tmp_path / "store"))


def refuse(action: Callable[[], Any], *words: str) -> None:
    """Require an error of one line that says all of `words` and what to do."""
    with pytest.raises(StoreError) as caught:
        action()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 600
    assert "again" in message or "move it" in message, message


# Recipes


def test_bytes_by_hand() -> None:
    assert stored_bytes("bf16", (3, 5)) == 30 and stored_bytes("f32", (7,)) == 28
    assert stored_bytes("fp8_block", (129, 128)) == 129 * 128 + 2 * 4
    assert stored_bytes("accurate", (17, 129)) == 2 * 2 * 1152 and stored_bytes("fast", (17, 129)) == 2 * 2 * 1088
    assert stored_bytes("q8", (2048, 7168)) == 2048 * 7168 * 33 // 32


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=str)
def test_representations_follow_from_the_component(recipe: Any) -> None:
    inventory = Inventory.of(parse_config(TINY))
    of = {name: representations(spec, recipe.of(inventory.config)) for name, spec in inventory.by_name.items()}
    base = {"balanced": "accurate"}.get(recipe.name, recipe.name)
    linears = ("q8",) if base == "q8" else ("q8", base)
    assert of["layers.1.ffn.experts.3.w1"] == of["layers.3.ffn.experts.3.w2"] == (base,)
    assert of["layers.1.ffn.experts.3.w2"] == (("q8",) if recipe.name == "accurate" else (base,))
    for name in ("embed", "layers.3.embed"):
        assert of[name] == ("bf16",)
    for name in ("norm", "layers.1.ffn.gate.weight", "layers.1.ffn.gate.bias", "layers.0.attn.kv_norm"):
        assert of[name] == ("f32",)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        assert of[f"layers.3.{name}"] == ("f32",)
    for name in ("head", "layers.0.ffn.w1", "layers.1.ffn.shared_experts.w2", "layers.0.attn.wkv_b"):
        assert of[name] == linears
    assert of["layers.3.eh_proj"] == of["layers.3.shared_head.head"] == linears


def test_the_store_of_r1_has_its_known_size() -> None:
    inventory = Inventory.of(parse_config(tiny_config(R1 | {"num_nextn_predict_layers": 0})))
    plans = plan_store(inventory, find_recipe("balanced").of(inventory.config))
    assert len(plans) == 62
    records = [entry for plan in plans.values() for entry in plan.tensors if entry.record]
    assert sum(entry.nbytes for entry in records) / 2**30 == pytest.approx(342.6, abs=0.05)
    linears = 11.4e9 + 3.7e9 + 0.93e9  # parameters, FACTS: attention, shared and dense, head
    rest = sum(plan.nbytes for plan in plans.values()) - sum(entry.nbytes for entry in records)
    assert rest == pytest.approx(linears * (8.25 + 4.5) / 8 + 0.93e9 * 2 + 0.11e9 * 4, rel=0.01)


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(StoreError, match="no recipe 'best'; give one of fast, balanced, accurate, q8, or a file"):
        find_recipe("best")


# The writer


@given(st.lists(st.tuples(st.sampled_from(["U8", "BF16", "F32"]), st.integers(1, 200), st.sampled_from([64, 4096]))))
@settings(max_examples=25, deadline=None)
def test_what_is_written_opens_everywhere(tmp_path_factory: pytest.TempPathFactory, kinds: list[Any]) -> None:
    path = tmp_path_factory.mktemp("writer") / "any.safetensors"
    kinds = [("F32", 3, 64), *kinds]
    tensors = [NewTensor(f"t{i}", dtype, (size, 2), alignment) for i, (dtype, size, alignment) in enumerate(kinds)]
    plan = FilePlan.of(tensors, METADATA)
    values = {
        tensor.name: bytes((i * 7 + 11 * k) % 120 for k in range(tensor.nbytes)) for i, tensor in enumerate(tensors)
    }
    halves = {name: (memoryview(data)[:5], memoryview(data)[5:]) for name, data in values.items()}
    sha256 = write_safetensors(path, plan, lambda tensor: halves[tensor.name])
    assert sha256 == sha256_of(path) and path.stat().st_size == plan.nbytes
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    opened, loaded = SafetensorsFile.open(path), load_file(path)
    assert opened.data_start % 4096 == 0 and opened.metadata == METADATA
    for tensor in tensors:
        assert (opened.data_start + opened.spec(tensor.name).begin) % tensor.alignment == 0
        for read in (opened.tensor(tensor.name), loaded[tensor.name]):
            assert tuple(read.shape) == tensor.shape
            assert bytes(read.contiguous().view(torch.uint8).flatten().tolist()) == values[tensor.name]


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    plan = FilePlan.of([NewTensor("a", "U8", (4,)), NewTensor("b", "U8", (4,))], METADATA)
    with pytest.raises(ValueError, match="b takes 4 bytes, not 3"):
        write_safetensors(tmp_path / "x", plan, lambda tensor: [memoryview(bytes(4 if tensor.name == "a" else 3))])
    assert not (tmp_path / "x").exists()
    with pytest.raises(StoreError, match="cannot be written"):
        write_safetensors(tmp_path / "missing" / "x", plan, lambda tensor: [memoryview(bytes(4))])


# A store as it should be


@pytest.mark.parametrize(("recipe", "variant"), [("accurate", {}), ("fast", BF16), ("q8", {})])
def test_every_weight_is_the_encoded_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, variant: dict
) -> None:
    monkeypatch.setattr(convert_module, "STRIP_WEIGHTS", 1)  # strips of 128 rows
    source = Checkpoint.open(write_checkpoint(tmp_path / "source", SMALL | variant, seed=2))
    convert(source, tmp_path / "store", recipe)
    store = Store.open(tmp_path / "store")
    assert store.inventory.tensors == source.inventory.tensors
    for spec in store.inventory.tensors:
        expected = source.weight(spec.name).dequantize(torch.float32)
        for name in representations(spec, RECIPES[recipe].of(source.config)):
            weight = store.weight(spec.name, name)
            assert weight.shape == spec.shape and weight.format.name == name
            if name in PACKED_FORMATS:
                assert torch.equal(weight.data, encode(expected, PACKED_FORMATS[name])), spec.name
            else:
                assert torch.equal(weight.data.float(), expected)


def test_what_a_store_says_of_itself(made: Path) -> None:
    store = Store.open(made / "store")
    assert is_store(store.folder) and not is_store(made / "source")
    assert (store.recipe, store.record(1).format, list(store.mtp_layers)) == ("balanced", ACCURATE, [2])
    assert store.config == Checkpoint.open(made / "source").config
    assert store.representations("head") == ("q8", "accurate") and store.weight("head").format is Q8
    assert store.representations("layers.1.ffn.experts.0.w1") == ("accurate",)
    tensors = [tensor for path in store.folder.glob("*.safetensors") for tensor in load_file(path).values()]
    assert store.nbytes == sum(tensor.nbytes for tensor in tensors)
    for name, representation in [("nothing", None), ("head", "fast"), ("norm", "bf16")]:
        with pytest.raises(KeyError):
            store.weight(name, representation)
    with pytest.raises(KeyError):
        store.expert_records(0)


def test_records_hold_gate_up_and_down(made: Path) -> None:
    store = Store.open(made / "store")
    records = store.expert_records(1)
    assert records.dtype == torch.uint8 and records.shape == (4, store.record(1).nbytes)
    assert records.data_ptr() % 4096 == 0 and store.record(1).nbytes % 4096 == 0
    source = Checkpoint.open(made / "source")
    begin = 0
    for matrix in ("w1", "w3", "w2"):
        weight = source.weight(f"layers.1.ffn.experts.3.{matrix}")
        end = begin + ACCURATE.nbytes(weight.shape)
        decoded = decode(records[3, begin:end].numpy(), ACCURATE, weight.shape)
        error = torch.from_numpy(decoded) - weight.dequantize(torch.float32)
        assert error.norm() < 0.1 * weight.dequantize(torch.float32).norm()
        assert torch.equal(store.weight(f"layers.1.ffn.experts.3.{matrix}").data, records[3, begin:end])
        begin = end
    assert not records[:, begin:].any()


def test_mtp_layers_may_be_left_out(tmp_path: Path) -> None:
    fields = tiny_config(SMALL)
    tensors = {name: t for name, t in tiny_tensors(fields).items() if not name.startswith("model.layers.2.")}
    write_files(tmp_path / "source", fields, tensors)
    convert(Checkpoint.open(tmp_path / "source"), tmp_path / "store", "q8")
    store = Store.open(tmp_path / "store")
    assert store.config.n_mtp_layers == 0 and not store.mtp_layers
    assert not (store.folder / layer_file(2)).exists()


def test_an_embedding_in_float32_stays_so(tmp_path: Path) -> None:
    fields = tiny_config(SMALL | BF16)
    tensors = tiny_tensors(fields)
    exact = tensors["model.embed_tokens.weight"].float() * (1 + 2**-12)
    tensors["model.embed_tokens.weight"] = exact
    write_files(tmp_path / "source", fields, tensors)
    convert(Checkpoint.open(tmp_path / "source"), tmp_path / "store", "q8")
    assert torch.equal(Store.open(tmp_path / "store").weight("embed").data, exact)


# What is refused


def test_a_conversion_that_was_not_finished(store: Path) -> None:
    (store / MANIFEST_NAME).unlink()
    (store / JOURNAL_NAME).write_text("{}")
    assert is_store(store)
    refuse(lambda: Store.open(store), "not finished", "run the same `dsr1 quantize` again")


def test_a_folder_without_manifest(made: Path) -> None:
    refuse(lambda: Store.open(made / "source"), "no dsr1-store.json")


def test_flipped_bits_are_found_by_verify(store: Path) -> None:
    done: list[Any] = []
    Store.open(store).verify(done.append)
    assert done[-1].done == done[-1].total == sum(f.nbytes for f in read_manifest(store).files.values())
    data = bytearray((store / MOE_FILE).read_bytes())
    data[-5000] ^= 4
    (store / MOE_FILE).write_bytes(data)
    refuse(lambda: Store.open(store).verify(done.append), "checksum", MOE_FILE)


def test_files_that_are_cut_missing_or_foreign(store: Path) -> None:
    shutil.copy(store / MOE_FILE, store / "model.safetensors")
    refuse(lambda: Store.open(store), "model.safetensors", "not part of the store")
    (store / "model.safetensors").unlink()
    whole = (store / MOE_FILE).read_bytes()
    (store / MOE_FILE).write_bytes(whole[:-1])
    refuse(lambda: Store.open(store), MOE_FILE, f"{len(whole) - 1} bytes")
    (store / MOE_FILE).unlink()
    refuse(lambda: Store.open(store), MOE_FILE, "missing")


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; ... removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))


FORMATS = {fmt.name: fmt.descriptor() for fmt in (Q8, ACCURATE)}
HASH = "0" * 64


def runs(*used: tuple[int, int, Any]) -> list[dict[str, Any]]:
    """What a manifest says of experts."""
    return [{"layers": [first, last], "gate_up": name, "down": name} for first, last, name in used]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "gguf"}, ["'gguf'"]),
        ({"version": 1}, ["version 1", "reads version 3"]),
        ({"version": 4, "new": 1, "files": ...}, ["version 4"]),
        ({"comment": "mine"}, ["unknown field 'comment'"]),
        ({"files": ...}, ["'files' is missing"]),
        ({"formats": FORMATS | {"q3": {}}}, ["'q3'", "update dsr1"]),
        ({"formats": FORMATS | {"q8": Q8.descriptor() | {"group": 64}}}, ["'q8'", "'group'"]),
        ({"formats": FORMATS | {"q8": Q8.descriptor() | {"shift": 1}}}, ["'q8'", "'shift'"]),
        ({"formats": FORMATS | {"q8": 8}}, ["'q8'"]),
        ({"formats": FORMATS | {"fast": FAST.descriptor()}}, ["formats that neither"]),
        ({"experts": "fast"}, ["experts is not a list"]),
        ({"experts": [{"layers": [1, 2], "gate_up": "q8"}]}, ["experts is not a list"]),
        ({"experts": runs((1, 2, "fast"))}, ["'fast'", "not formats that it describes"]),
        ({"experts": runs((1, 2, 8))}, ["not formats that it describes"]),
        ({"experts": []}, ["lacks the formats", "layer 1"]),
        ({"experts": runs((1, 1, "accurate"))}, ["lacks the formats", "layer 2"]),
        ({"experts": runs((0, 2, "accurate"))}, ["against config.json", "layer 0"]),
        ({"experts": runs((1, 2, "accurate"), (2, 2, "q8"))}, ["layer 2 twice"]),
        ({"experts": runs((2, 1, "accurate"))}, ["[2, 1]", "a first and a last layer"]),
        ({"experts": runs((1, 10**9, "accurate"))}, ["a first and a last layer"]),
        ({"experts": runs((1, 2, "q8"))}, ["layers.1.ffn.experts", "ask for"]),
        ({"linears": ["q8"]}, ["linears does not name"]),
        ({"linears": {"head": ["q8"]}}, ["linears does not name"]),
        ({"linears": dict.fromkeys(LINEARS, [])}, ["[]", "not formats that it describes"]),
        ({"linears": dict.fromkeys(LINEARS, ["accurate"])}, ["formats that neither"]),
        ({"embedding": "fp8"}, ["'fp8'"]),
        ({"embedding": "f32"}, [".embed'", "BF16", "F32"]),
        ({"mtp_layers": True}, ["mtp_layers is True"]),
        ({"mtp_layers": 0}, ["against config.json", "layer 2"]),
        ({"mtp_layers": 2}, ["2 MTP layers", "tells of 1"]),
        ({"files": []}, ["files is not an object"]),
        ({"files": {"../x": {"bytes": 1, "sha256": HASH}}}, ["'../x'"]),
        ({"files": {"x": {"bytes": -1, "sha256": HASH}}}, ["'x'", "impossible"]),
        ({"files": {"x": {"bytes": 1, "sha256": HASH, "md5": ""}}}, ["'x'", "other fields"]),
    ],
)
def test_a_manifest_that_is_not_known_whole(store: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit(store / MANIFEST_NAME, **changes)
    refuse(lambda: Store.open(store), *words)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_damaged_manifest_is_told_in_a_sentence(made: Path, data: st.DataObject) -> None:
    text = bytearray((made / "store" / MANIFEST_NAME).read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    folder = made / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST_NAME).write_bytes(text)
    try:
        read_manifest(folder)
    except Dsr1Error as error:
        assert "again" in str(error)


def rewrite(store: Path, file: str, change: Callable[[list[NewTensor]], list[NewTensor]]) -> None:
    """Write a file of zeros with other tensors, which the manifest lists as it is."""
    manifest = read_manifest(store)
    store_plan = plan_store(Store.open(store).inventory, manifest.formats)[file]
    plan = FilePlan.of(change(list(store_plan.tensors)), METADATA)
    sha256 = write_safetensors(store / file, plan, lambda tensor: [memoryview(bytes(tensor.nbytes))])
    list_as_it_is(store, file, FileRecord(plan.nbytes, sha256))


def list_as_it_is(store: Path, file: str, record: FileRecord) -> None:
    manifest = read_manifest(store)
    (store / MANIFEST_NAME).write_bytes(replace(manifest, files={**manifest.files, file: record}).to_json())


def changed(name: str, **changes: Any) -> Callable[[list[NewTensor]], list[NewTensor]]:
    return lambda tensors: [replace(t, **changes) if t.name == name else t for t in tensors]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: [t for t in tensors if t.name != "layers.1.ffn_norm"], ["lacks", "layers.1.ffn_norm"]),
        (lambda tensors: [NewTensor("layers.1.extra", "U8", (1,)), *tensors], ["layers.1.extra", "does not have"]),
        (changed("layers.1.ffn_norm", dtype="BF16"), ["layers.1.ffn_norm", "BF16", "F32"]),
        (changed("layers.1.attn.wo.q8", shape=(7,)), ["layers.1.attn.wo.q8", "(7,)"]),
        (changed(RECORDS, shape=(3, 12288)), [RECORDS]),
        (
            lambda tensors: [NewTensor("padding.9", "U8", (4,)), *changed(RECORDS, alignment=1)(tensors)],
            [RECORDS, "4096"],
        ),
    ],
    ids=["missing", "extra", "dtype", "shape", "experts", "alignment"],
)
def test_tensors_that_are_not_those_of_the_model(store: Path, change: Any, words: list[str]) -> None:
    rewrite(store, MOE_FILE, change)
    refuse(lambda: Store.open(store), MOE_FILE, *words)


def test_files_of_another_writer(store: Path) -> None:
    tensors: Tensors = load_file(store / MOE_FILE)
    save_file(tensors, store / MOE_FILE, metadata={"format": "pt"})
    list_as_it_is(store, MOE_FILE, FileRecord((store / MOE_FILE).stat().st_size, HASH))
    refuse(lambda: Store.open(store), MOE_FILE, "not written by `dsr1 quantize`")


def test_a_damaged_header_is_not_to_be_downloaded(store: Path) -> None:
    data = bytearray((store / MOE_FILE).read_bytes())
    data[8] = ord("[")
    (store / MOE_FILE).write_bytes(data)
    with pytest.raises(StoreError, match="run `dsr1 quantize` again") as caught:
        Store.open(store)
    assert "download" not in str(caught.value)


def test_a_config_of_another_shape(store: Path) -> None:
    text = (store / "config.json").read_text()
    (store / "config.json").write_text(text.replace('"hidden_size": 144', '"hidden_size": 160'))
    refuse(lambda: Store.open(store), "layer-000.safetensors", "160")

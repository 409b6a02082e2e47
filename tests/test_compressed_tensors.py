"""Pack-quantized checkpoints, unpacked by the compressed-tensors library, and loaded by transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hybrid_rt.models import NANO_R1
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import StoreError
from quant.export.block_reference import encode
from quant.export.checkpoint import export_checkpoint
from quant.export.compressed_tensors import find_recipe, is_packed, plan_shards, quantization_config
from quant.export.source import open_source
from quant.inventory import Inventory
from quant.journal import JOURNAL_NAME
from quant.packing import decode
from quant.progress import Progress
from quant.store import Store
from tests.test_quantize import tree
from tests.tiny_checkpoint import R1, RAGGED, tiny_config, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("source"), seed=4))


def export(source: Any, folder: Path, recipe: str = "experts") -> dict[str, torch.Tensor]:
    """All tensors of the files that the index names, each in the file that it names."""
    export_checkpoint(source, folder, find_recipe(recipe))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(index.values())}
    assert {name: file for file, tensors in files.items() for name in tensors} == index
    return {name: files[file][name] for name, file in index.items()}


def unpacked(tensors: dict[str, torch.Tensor], module: str, folder: Path) -> torch.Tensor:
    """What the library makes of a module, with the scheme of config.json."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig

    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(fields).config_groups["group_0"]
    parts = {name: tensors[f"{module}.{name}"] for name in ("weight_packed", "weight_scale", "weight_shape")}
    compressor = compressors.BaseCompressor.get_value_from_registry(fields["format"])
    return compressor.decompress(parts, scheme)["weight"]


def by_hand(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """The values of a module by the formula: (4 bits - 8) × scale, rounded once to bfloat16. [N, K]"""
    packed, scale = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"]
    rows, columns = tensors[f"{module}.weight_shape"].tolist()
    codes = torch.stack([packed >> 4 * i & 15 for i in range(8)], dim=2).reshape(rows, columns) - 8
    return (codes * scale.float().repeat_interleave(columns // scale.shape[1], 1)).bfloat16()


def module_of(source: Any, name: str) -> str:
    return source.inventory.by_name[name].source.removesuffix(".weight")


@pytest.mark.parametrize("recipe", ["experts", "linears"])
def test_the_library_unpacks_what_the_reference_gives(source: Checkpoint, tmp_path: Path, recipe: str) -> None:
    tensors = export(source, tmp_path / "packed", recipe)
    told = find_recipe(recipe)
    packed = [spec for spec in source.inventory.tensors if is_packed(spec, told)]
    assert len(packed) == {"experts": 9 * 16, "linears": 9 * 16 + 9 + 3 + 4 * 5}[recipe]
    for spec in packed[:: 7 if recipe == "experts" else 5]:
        weight = source.weight(spec.name).dequantize(torch.float32).numpy()
        blocks = encode(weight.reshape(-1, told.group), told.type)
        scales = torch.from_numpy(blocks[:, :2].copy()).view(torch.bfloat16).float()
        codes = np.stack([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=2).reshape(len(blocks), -1)
        reference = ((torch.from_numpy(codes).float() - 8) * scales).reshape(spec.shape).bfloat16()
        module = module_of(source, spec.name)
        assert torch.equal(by_hand(tensors, module), reference)
        assert torch.equal(unpacked(tensors, module, tmp_path / "packed").bfloat16(), reference)
        error = float(((reference.float().numpy() - weight) ** 2).sum() / (weight**2).sum())
        assert error < {"experts": 0.0072, "linears": 0.0105}[recipe], spec.name


def test_everything_else_is_bfloat16(source: Checkpoint, tmp_path: Path) -> None:
    tensors = export(source, tmp_path / "packed")
    for spec in source.inventory.tensors:
        if not is_packed(spec, find_recipe("experts")):
            written = tensors.pop(spec.source)
            assert written.dtype == (torch.float32 if spec.name.endswith("gate.bias") else torch.bfloat16)
            assert torch.equal(written, source.weight(spec.name).dequantize(written.dtype)), spec.source
    assert all(name.endswith(("_packed", "_scale", "_shape")) for name in tensors)  # no padding, no FP8 scales


def test_transformers_loads_it(source: Checkpoint, tmp_path: Path) -> None:
    """Decoded while loading: transformers fuses experts, and has no packed form of them."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    tensors = export(source, tmp_path / "packed")
    settings = transformers.CompressedTensorsConfig(dequantize=True)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.bfloat16, quantization_config=settings, output_loading_info=True
    )
    assert not told["missing_keys"] and all(".layers.3." in name for name in told["unexpected_keys"])  # the MTP layer
    experts = model.model.layers[1].mlp.experts
    gate, up = (by_hand(tensors, f"model.layers.1.mlp.experts.5.{name}") for name in ("gate_proj", "up_proj"))
    assert torch.equal(experts.gate_up_proj[5], torch.cat([gate, up]))
    assert torch.equal(experts.down_proj[5], by_hand(tensors, "model.layers.1.mlp.experts.5.down_proj"))
    attention = tensors["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(model.model.layers[1].self_attn.o_proj.weight, attention)


# Stores: what is without loss


def test_codes_of_fast_are_taken_over(source: Checkpoint, tmp_path: Path) -> None:
    """Not without loss: a scale is a bfloat16 times an integer below 16, of 12 bits, and bfloat16 holds 8."""
    convert(source, tmp_path / "store", "fast")
    store = Store.open(tmp_path / "store")
    exported = export_checkpoint(store, tmp_path / "packed", find_recipe("experts"))
    assert exported.encoded == 0
    tensors = load_file(next((tmp_path / "packed").glob("*.safetensors")))
    weight = store.weight("layers.1.ffn.experts.3.w2")
    stored = decode(weight.data.numpy(), weight.format, weight.shape)  # type: ignore[arg-type]
    module = module_of(store, "layers.1.ffn.experts.3.w2")
    packed, scale = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"]
    codes = torch.stack([packed >> 4 * i & 15 for i in range(8)], dim=2).reshape(weight.shape) - 8
    exact = (codes * scale.float().repeat_interleave(32, 1)).numpy()
    np.testing.assert_allclose(exact, stored, rtol=2**-8, atol=0)
    assert 0.3 < (exact != stored).mean() < 0.95
    assert torch.equal(unpacked(tensors, module, tmp_path / "packed"), by_hand(tensors, module))


def test_which_scales_of_fast_bfloat16_holds() -> None:
    """For how many of the 128 mantissas of d the product with each |s| is exact, in bfloat16 and in half precision."""
    mantissas = torch.arange(128, 256, dtype=torch.float32)
    exact = {
        dtype: [int((mantissas * s == (mantissas * s).to(dtype).float()).sum()) for s in range(1, 16, 2)]
        for dtype in (torch.bfloat16, torch.float16)
    }
    assert exact[torch.bfloat16] == [128, 43, 26, 18, 14, 12, 10, 9]
    assert exact[torch.float16] == [128, 128, 128, 128, 114, 93, 79, 68]


# The folder


def test_config_and_other_files(source: Checkpoint, tmp_path: Path) -> None:
    (source.folder / "tokenizer.json").write_text("{}")
    export(source, tmp_path / "packed")
    fields = json.loads((tmp_path / "packed" / "config.json").read_text())
    quantization = fields.pop("quantization_config")
    published = json.loads((source.folder / "config.json").read_text())
    assert fields == {key: value for key, value in published.items() if key != "quantization_config"}
    assert quantization["quant_method"] == "compressed-tensors" and quantization["format"] == "pack-quantized"
    group = quantization["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    told = {"num_bits": 4, "group_size": 32, "symmetric": True, "strategy": "group", "type": "int"}
    assert group["weights"] | told == group["weights"]
    assert (tmp_path / "packed" / "tokenizer.json").read_text() == "{}"
    (source.folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("recipe", ["experts", "linears"])
def test_ignore_names_every_linear_layer_that_is_not_packed(source: Checkpoint, recipe: str) -> None:
    matching = pytest.importorskip("compressed_tensors.utils.match")
    told = find_recipe(recipe)
    ignored = quantization_config(source.inventory, told)["ignore"]
    module = torch.nn.Linear(1, 1)
    for spec in source.inventory.tensors:
        if len(spec.shape) == 2 and "embed" not in spec.name:
            name = spec.source.removesuffix(".weight")
            is_ignored = any(matching.is_match(name, module, pattern) for pattern in ignored)
            assert is_ignored == (not is_packed(spec, told)), name


def test_shards_of_r1() -> None:
    """5 GB at most, all tensors once, and each where its type may begin."""
    from quant.config import parse_config

    inventory = Inventory.of(parse_config(tiny_config(R1)))
    plans = plan_shards(inventory, find_recipe("experts"))
    assert len(plans) == 83 and list(plans)[-1] == "model-00083-of-00083.safetensors"
    assert max(plan.nbytes for plan in plans.values()) < 5.01e9
    sizes = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2}
    for plan in plans.values():
        starts = zip(plan.tensors, plan.begins, strict=True)
        assert all((len(plan.head) + begin) % sizes[tensor.dtype] == 0 for tensor, begin in starts)
    total = sum(plan.nbytes for plan in plans.values())
    assert round(total / 1e9, 1) == 412.8


def test_an_interrupted_export_is_no_model_and_continues(source: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "packed"

    class StopError(Exception):
        pass

    def stop(step: Progress) -> None:
        if step.done > step.total // 2:
            raise StopError

    with pytest.raises(StopError):
        export_checkpoint(source, folder, find_recipe("experts"), stop)
    assert {path.name for path in folder.iterdir()} == {JOURNAL_NAME, "model-00001-of-00001.safetensors.part"}
    with pytest.raises(StoreError, match="not finished"):
        open_source(folder)
    with pytest.raises(StoreError, match="another recipe"):
        export_checkpoint(source, folder, find_recipe("linears"))
    steps: list[Progress] = []
    export_checkpoint(source, folder, find_recipe("experts"), steps.append)
    assert steps[0].done > steps[0].total // 3  # what was done was not done again
    export_checkpoint(source, tmp_path / "whole", find_recipe("experts"))
    assert tree(folder) == tree(tmp_path / "whole")
    with pytest.raises(StoreError, match="not empty"):
        export_checkpoint(source, folder, find_recipe("experts"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty"):
        export_checkpoint(source, tmp_path / "other", find_recipe("experts"))


def test_shapes_without_whole_groups_are_refused(tmp_path: Path) -> None:
    ragged = Checkpoint.open(write_checkpoint(tmp_path / "source", RAGGED))
    with pytest.raises(StoreError, match=r"rows of 208 weights.*32"):
        export_checkpoint(ragged, tmp_path / "packed", find_recipe("experts"))
    with pytest.raises(StoreError, match="groups of 128"):
        export_checkpoint(Checkpoint.open(NANO_R1), tmp_path / "packed", find_recipe("linears"))
    with pytest.raises(StoreError, match="experts, linears"):
        find_recipe("g64")
    assert not (tmp_path / "packed").exists()

"""Stores that run: against the checkpoint they were made from, on the CPU and on an emulated GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybrid_rt import Engine, Sampling
from hybrid_rt.generation import collect
from hybrid_rt.models import NANO_R1, resolve_model
from hybrid_rt.moe import MoE
from offload.emulate import EmulatedBackend
from offload.experts import PackedExperts
from offload.node_experts import NodeExperts
from offload.plan import PlanError
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import DeviceError, Dsr1Error, StoreError
from quant.progress import Progress
from quant.recipes import RECIPES
from quant.store import Store, is_store
from tests.test_cli import dsr1, refused

pytestmark = pytest.mark.usefixtures("one_thread")

# Relative errors of logits. A random model makes them large: where two experts score alike, another one is chosen.
LIMITS = {"q8": 0.2, "accurate": 0.35, "balanced": 0.35, "fast": 0.45}


@pytest.fixture(scope="module")
def stores(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of each recipe, of one small model."""
    folder = tmp_path_factory.mktemp("stores")
    for recipe in RECIPES:
        convert(Checkpoint.open(chat_folder), folder / recipe, recipe)
    return {recipe: folder / recipe for recipe in RECIPES}


def random_ids(engine: Engine, count: int, seed: int = 0) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(engine.config.vocab_size, (count,), generator=rng).tolist()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_store_says_nearly_what_its_checkpoint_says(recipe: str, chat_folder: Path, stores: dict[str, Path]) -> None:
    checkpoint = Engine.load(chat_folder, dtype="float32", threads=1)
    store = Engine.load(stores[recipe], dtype="float32", threads=1)
    ids = random_ids(checkpoint, 60)
    expected, logits = checkpoint.logits(ids), store.logits(ids)
    error = ((logits - expected).norm() / expected.norm()).item()
    assert 0.001 < error < LIMITS[recipe]


def test_chunks_of_a_store_change_next_to_nothing(stores: dict[str, Path]) -> None:
    engine = Engine.load(stores["accurate"], dtype="float32", threads=1)
    ids = random_ids(engine, 40, seed=1)
    whole = engine.logits(ids)[-1]
    session = engine.session()
    session.append(ids[:7])
    for token in ids[7:10]:
        session.append([token])
    error = ((session.append(ids[10:]) - whole).norm() / whole.norm()).item()
    assert error < 0.02  # a rounded activation may fall on the other side


def test_a_store_answers_and_streams(stores: dict[str, Path]) -> None:
    done = dsr1("run", stores["fast"], "--json", "-p", "Hello", "--max-new-tokens", 6, "--seed", 1)
    record = json.loads(done.stdout)
    assert done.returncode == 0 and 1 <= len(record["token_ids"]) <= 6


def test_an_emulated_gpu_gives_the_same_tokens_within_its_budget(stores: dict[str, Path]) -> None:
    sampling = Sampling(temperature=0, max_new_tokens=8)
    alone = Engine.load(stores["accurate"], context=200, threads=1, pins=["chunk=200"])
    ids = random_ids(alone, 150)
    options = {"gpu_mem": "2G", "context": 200, "device": "emulate", "threads": 1}
    emulated = Engine.load(stores["accurate"], pins=["chunk=200"], **options)
    assert collect(emulated.generate(ids, sampling)).token_ids == collect(alone.generate(ids, sampling)).token_ids
    assert emulated.plan.device == "emulate" and emulated.plan.representation(1, "attention") == "q8"


@pytest.mark.parametrize("residency", ["copied", "locked"])
def test_experts_give_the_same_logits_wherever_they_are_kept(residency: str, stores: dict[str, Path]) -> None:
    mapped = Engine.load(stores["accurate"], residency="mapped", threads=1)
    told: list[Progress] = []
    kept = Engine.load(stores["accurate"], residency=residency, threads=1, progress=told.append)
    ids = random_ids(mapped, 20)
    assert torch.equal(kept.logits(ids), mapped.logits(ids))
    experts = {type(block.ffn.experts.weights) for block in kept.transformer.layers if isinstance(block.ffn, MoE)}
    assert experts == {NodeExperts if residency == "copied" else PackedExperts}
    assert kept.plan.placement(1, "routed_expert").residency == residency
    assert told[-1].done == told[-1].total == sum(kept.plan.placement(n, "routed_expert").nbytes for n in (1, 2))


def test_a_checkpoint_and_a_limit_on_locking_are_told(
    chat_folder: Path, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PlanError, match="only a store's experts can be locked"):
        Engine.load(chat_folder, residency="locked")
    monkeypatch.setattr("offload.memory.lockable", lambda: 4096)
    with pytest.raises(DeviceError, match="memlock"):
        Engine.load(stores["accurate"], residency="locked")


def error_of(engine: Engine, other: Engine, ids: list[int]) -> float:
    logits, expected = engine.logits(ids), other.logits(ids)
    return ((logits - expected).norm() / expected.norm()).item()


def test_experts_on_the_gpu_beside_those_on_the_cpu(stores: dict[str, Path]) -> None:
    emulated = {"gpu_mem": "2G", "context": 200, "device": "emulate", "threads": 1, "dtype": "float32"}
    alone = Engine.load(stores["accurate"], pins=["experts=mapped"], **emulated)
    split = Engine.load(stores["accurate"], pins=["experts:1/3-9=mapped", "experts:2/0=mapped"], **emulated)
    ids = random_ids(alone, 60)
    assert [p.tier for p in split.plan.expert_placements(1)] == ["gpu", "ram", "gpu"]
    assert split.plan.representation(1, "routed_expert") == "accurate+q8"  # down of the first such layer
    assert split.plan.gpu_experts() == 2 * 16 - 8 and alone.plan.gpu_experts() == 0
    assert counted_weights(split) == split.plan.weight_bytes("gpu")
    assert error_of(split, alone, ids) < 1e-5  # sums in another order
    session = split.session()
    assert torch.equal(session.append(ids[:1]), split.logits(ids[:1])[-1])


@pytest.mark.parametrize("device", ["cpu", "emulate"])
def test_an_8_bit_cache_changes_little(device: str, stores: dict[str, Path]) -> None:
    options = {"gpu_mem": "2G" if device == "emulate" else None, "context": 300, "device": device, "threads": 1}
    exact, packed = (Engine.load(stores["q8"], pins=[f"cache={fmt}"], **options) for fmt in ("bfloat16", "int8"))
    ids = random_ids(exact, 200)
    assert packed.session().cache.data.dtype == torch.uint8
    assert 0 < error_of(packed, exact, ids) < 2 * LIMITS["q8"]
    session = packed.session()
    session.append(ids[:150])
    for token in ids[150:160]:  # steps of one token, which would be recorded
        logits = session.append([token])
    again = packed.session()
    error = (again.append(ids[:160]) - logits).norm() / logits.norm()
    assert error < 2 * LIMITS["q8"] and session.fork().cache.data.shape == session.cache.data.shape


def test_a_saved_plan_runs(stores: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = dsr1("plan", stores["fast"], "--device", "emulate", "--gpu-mem", "2G", "--context", 100, "--save", path)
    assert done.returncode == 0, done.stderr
    engine = Engine.load(stores["fast"], plan=path, pins=["experts:1=mapped"], threads=1)
    assert engine.plan.device == "emulate" and engine.plan.context == 100 and engine.plan.gpu_experts() == 16
    assert "another model" in refused(dsr1("run", "nano-r1", "-p", "x", "--plan", path))


def counted_weights(engine: Engine) -> int:
    """Bytes of the GPU tier's weights, as the ledger has them."""
    assert isinstance(engine.backend, EmulatedBackend)
    counted = engine.backend.ledger.used_by
    return sum(counted[placement] for placement in {p.component for p in engine.plan.placements if p.tier == "gpu"})


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plan_s_bytes_are_the_bytes_counted(recipe: str, stores: dict[str, Path]) -> None:
    engine = Engine.load(stores[recipe], gpu_mem="2G", context=256, device="emulate", threads=1)
    assert counted_weights(engine) == engine.plan.weight_bytes("gpu")
    session = engine.session()
    assert session.cache.data.nbytes == engine.plan.cache_bytes


def test_a_checkpoint_s_plan_counts_its_own_formats(chat_folder: Path) -> None:
    engine = Engine.load(chat_folder, gpu_mem="2G", context=256, device="emulate", threads=1)
    assert engine.plan.representation(1, "attention") == "fp8_block"
    assert counted_weights(engine) == engine.plan.weight_bytes("gpu")


@pytest.mark.parametrize("context", [100, 1500])
def test_the_largest_prompt_stays_within_the_smallest_budget(context: int, stores: dict[str, Path]) -> None:
    plan = Engine.load(stores["accurate"], gpu_mem="2G", context=context, device="emulate", threads=1).plan
    engine = Engine.load(stores["accurate"], gpu_mem=plan.gpu_bytes, context=context, device="emulate", threads=1)
    completion = collect(engine.generate(random_ids(engine, context), Sampling(temperature=0, max_new_tokens=3)))
    assert completion.finish_reason in ("length", "stop")
    ledger = engine.backend.ledger
    assert (
        counted_weights(engine) + plan.cache_bytes < ledger.peak <= ledger.budget == plan.gpu_bytes - plan.reserve_bytes
    )


def test_a_smaller_budget_takes_4_bits_and_then_is_refused(stores: dict[str, Path]) -> None:
    emulated = {"context": 64, "device": "emulate", "threads": 1}
    roomy = Engine.load(stores["accurate"], gpu_mem="2G", pins=["experts=mapped"], **emulated).plan
    tight = Engine.load(stores["accurate"], gpu_mem=roomy.gpu_bytes - 1, **emulated)
    assert tight.plan.cache_format == "bfloat16"  # of so few tokens, 8 bits would save less than unpacking takes
    assert tight.plan.representation(1, "shared_expert") == "accurate"
    assert counted_weights(tight) == tight.plan.weight_bytes("gpu") < roomy.weight_bytes("gpu")
    tokens = collect(tight.generate([5, 6, 7], Sampling(temperature=0, max_new_tokens=2))).token_ids
    assert len(tokens) <= 2
    with pytest.raises(PlanError, match="short"):
        Engine.load(stores["accurate"], gpu_mem="769M", context=2048, device="emulate", threads=1)


def test_a_recipe_that_a_model_was_not_made_with_is_refused(chat_folder: Path, stores: dict[str, Path]) -> None:
    with pytest.raises(Dsr1Error, match="made with the recipe fast"):
        Engine.load(stores["fast"], recipe="accurate", threads=1)
    with pytest.raises(Dsr1Error, match="dsr1 quantize"):
        Engine.load(chat_folder, recipe="accurate", threads=1)
    with pytest.raises(StoreError, match="no recipe"):
        resolve_model("nano-r1", "nonsense", [])


def test_verify_finds_a_flipped_bit(stores: dict[str, Path], tmp_path: Path) -> None:
    convert(Checkpoint.open(NANO_R1), tmp_path / "store", "q8")
    file = tmp_path / "store" / "layer-001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    words = refused(dsr1("run", tmp_path / "store", "--verify", "-p", "Hi"))
    assert "layer-001.safetensors" in words and "quantize" in words
    assert Engine.load(stores["q8"], verify=True, threads=1).notes[-1].startswith("context")


def test_the_plan_is_shown_where_it_was_asked_for(stores: dict[str, Path]) -> None:
    words = ("run", stores["accurate"], "-p", "Hi", "--max-new-tokens", 1)
    done = dsr1(*words, "--gpu-mem", "24G")
    assert "without effect" in done.stderr and "routed experts" in done.stderr and "routed" not in done.stdout
    assert "routed experts" not in dsr1(*words).stderr
    shown = dsr1(*words, "--gpu-mem", "24G", "--device", "emulate").stderr
    assert "GPU: " in shown and "of 24.0 GiB" in shown


MAKE = (
    "import sys; from pathlib import Path; import hybrid_rt.nano_store as it\n"
    "it.user_cache = lambda: Path(sys.argv[1])\n"
    "print(it.nano_store('fast'))\n"
)


def test_processes_that_make_nano_r1_s_store_at_once(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    running = [
        subprocess.Popen([sys.executable, "-c", MAKE, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = {process.communicate(timeout=300)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(told) == 1
    [folder] = list((tmp_path / "stores").iterdir())
    assert str(folder) == told.pop() and is_store(folder)
    Store.open(folder).verify(lambda _: None)


def test_without_a_cache_the_checkpoint_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("hybrid_rt.nano_store.user_cache", lambda: tmp_path / "file")
    notes: list[str] = []
    assert resolve_model(None, None, notes) == NANO_R1 and "FP8 checkpoint runs" in notes[0]
    with pytest.raises(StoreError, match="cache folder"):
        resolve_model("nano-r1", "fast", [])


def test_on_a_full_disk_the_checkpoint_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr("hybrid_rt.nano_store.user_cache", lambda: tmp_path)
    monkeypatch.setattr("hybrid_rt.nano_store.convert", full)
    notes: list[str] = []
    assert resolve_model(None, None, notes) == NANO_R1 and "the disk is full" in notes[0]
    assert not list((tmp_path / "stores").iterdir())

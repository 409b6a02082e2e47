"""A GPU's way through the model, on the CPU: its attention's formulas, and steps replayed from a recording."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybrid_rt.cache import LatentCache
from hybrid_rt.gpu_attention import DeviceAttention
from hybrid_rt.graph_step import GraphSteps
from hybrid_rt.latent_attention import CachedAttention
from hybrid_rt.loader import StoredParts
from hybrid_rt.rope import softmax_scale
from hybrid_rt.transformer import Transformer
from offload.backend import CpuBackend
from offload.experts import ExpertBuffers
from offload.graphs import GraphingBackend
from offload.machine import load_machine
from offload.order import violations
from offload.parts import Budget
from offload.planner import Planning, make_plan
from offload.recording import RecordingBackend
from offload.this_machine import TYPICAL
from quant.checkpoint import Checkpoint
from quant.formats import QuantTensor
from quant.inventory import CacheFormat
from tests.test_order import Tape
from tests.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "one_kernel_thread")
TOKENS = 150  # in prefill: more than are absorbed


class AsStored(StoredParts):
    """wkv_b as a GPU's attention reads it."""

    def whole(self, name: str) -> Callable[[], torch.Tensor | QuantTensor]:
        weight = self.source.weight(name)
        return lambda: weight


class Model:
    """A tiny model on a backend that records: `usual` and `device` differ in how attention reads wkv_b."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        source = Checkpoint.open(folder)
        self.config, self.scale = source.config, softmax_scale(source.config)
        self.recorder = RecordingBackend(CpuBackend())
        self.tape = Tape(self.recorder)
        self.backend = GraphingBackend(self.recorder, self.tape)
        budget = Budget("cpu", 0, 2**40, 512, "float32")
        available, machine = lambda spec: source.representations(spec.name), load_machine(TYPICAL)
        plan = make_plan(Planning(source.inventory, available, budget, machine))
        buffers = ExpertBuffers(source.config, self.backend, TOKENS)
        parts = (source, plan, dtype, self.backend, buffers)
        self.usual = Transformer(source.config, StoredParts(*parts), dtype, 0).eval()
        self.device = Transformer(source.config, AsStored(*parts), dtype, 0).eval()

    def cache(self, fmt: CacheFormat = "float32") -> LatentCache:
        return LatentCache(self.config, 512, fmt, self.backend)

    def run(self, ids: torch.Tensor, cache: LatentCache, on_device: bool = True) -> torch.Tensor:
        context = DeviceAttention if on_device else CachedAttention
        model = self.device if on_device else self.usual
        states: torch.Tensor = model(ids, context(cache, len(ids), self.scale))
        cache.length += len(ids)
        return states


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(write_checkpoint(tmp_path_factory.mktemp("gpu"), seed=3))


def random_ids(count: int) -> torch.Tensor:
    return torch.randint(0, 500, (count,), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("fmt", "most"), [("float32", 1e-4), ("int8", 0.5)])
def test_states_are_those_of_the_usual_way(model: Model, fmt: CacheFormat, most: float) -> None:
    """A long chunk, a short one that is absorbed, and single tokens.

    In 8 bits the least difference may turn a code, and then a choice of experts: that changes few tokens.
    """
    ids, caches, errors = random_ids(TOKENS + 40), [model.cache(fmt), model.cache(fmt)], []
    with torch.inference_mode():
        for chunk in ids.split([TOKENS, 38, 1, 1]):
            found, expected = (model.run(chunk, cache, way) for cache, way in zip(caches, (True, False), strict=True))
            errors.append((found - expected).norm(dim=-1) / expected.norm(dim=-1))
    error = torch.cat(errors)
    print(f"{fmt}: {error.median():.1e}, at most {error.max():.1e}")
    assert error.median() < 0.02 * most and error.max() < most


@pytest.mark.parametrize("fmt", ["float32", "int8"])
def test_steps_from_a_recording_are_those_without(model: Model, fmt: CacheFormat) -> None:
    """One and three tokens at a time, in turns; and all that was queued had an order."""
    ids, recorded, plain = random_ids(40), model.cache(fmt), model.cache(fmt)
    steps = GraphSteps(model.device, model.scale, model.backend)
    model.recorder.operations.clear()
    with torch.inference_mode():
        for chunk in ids.split([5, 1, 3, 1, 1, 3, 3, 1, 3, 1, 5, 13]):
            with model.recorder.counting(), model.tape:
                found = steps.forward(chunk, recorded)
            recorded.length += len(chunk)
            assert torch.equal(found, model.run(chunk, plain))
    assert {tokens: step.captured is not None for tokens, step in steps.steps.items()} == {
        5: True,
        1: True,
        3: True,
        13: False,
    }
    assert violations(model.recorder.operations) == []

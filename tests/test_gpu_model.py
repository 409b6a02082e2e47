"""A whole model whose attention is that of the GPU's Triton kernels, interpreted, with a cache of 16 and of 8 bits."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is missing; torch's wheels for CUDA and the extra `test` bring it")

from hybrid_rt.cache import LatentCache
from hybrid_rt.graph_step import GraphSteps
from quant.gpu import launch, ops, shapes
from quant.inventory import CacheFormat
from tests import interpreted_triton  # noqa: F401  mends the interpreter
from tests.test_gpu_attention import Model, random_ids
from tests.tiny_checkpoint import write_checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread", "one_kernel_thread", "kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here; tests/gpu runs them"),
]
KERNELS = ("absorb", "decode", "project", "linear", "prefill")
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}  # interpreting takes long
PROMPT = 132  # tokens: more than attention absorbs


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """On tensors of the CPU, kernels take the place of the formulas. The names of those that ran."""
    monkeypatch.setattr(shapes, "PROGRAMS", 4)  # few splits, as programs are interpreted one after the other
    ran: list[str] = []
    library = torch.library.Library("dsr1", "IMPL")

    def kernel(name: str) -> object:
        def run(*args: object) -> object:
            ran.append(name)
            return getattr(launch, name)(*args)

        return ops._checked(ops._FAKES[name], run)

    for name in KERNELS:
        library.impl(f"gpu_{name}", kernel(name), "CPU", allow_override=True)
    yield ran
    library._destroy()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(write_checkpoint(tmp_path_factory.mktemp("gpu"), SMALL, seed=5), torch.bfloat16)


@pytest.mark.parametrize(("fmt", "share"), [("bfloat16", 0.02), ("int8", 0.03)])
def test_states_are_those_of_the_cpu(model: Model, kernels: list[str], fmt: CacheFormat, share: float) -> None:
    """A prompt, a few tokens, and single ones as a recorded step. Medians, as a choice of experts may turn."""
    ids = random_ids(PROMPT + 6)
    device, usual = model.cache(fmt), model.cache(fmt)
    steps = GraphSteps(model.device, model.scale, model.backend)
    errors = []
    with torch.inference_mode():
        for chunk in ids.split([PROMPT, 3, 1, 1, 1]):
            expected = model.run(chunk, usual, on_device=False)
            found = run_on_device(model, chunk, device, steps)
            errors.append((found - expected).norm(dim=-1) / expected.norm(dim=-1))
    error = torch.cat(errors).float()
    print(f"{fmt}: {error.median():.1e} of states, at most {error.max():.1e}")
    assert set(kernels) == set(KERNELS)
    assert error.median() < share and errors[0].median() < share
    assert torch.cat(errors[1:]).median() < share


def run_on_device(model: Model, chunk: torch.Tensor, cache: LatentCache, steps: GraphSteps) -> torch.Tensor:
    if len(chunk) > 1:
        return model.run(chunk, cache)
    with model.recorder.counting(), model.tape:
        found = steps.forward(chunk, cache)
    cache.length += 1
    return found

"""A whole small model on a GPU: the same answers as on the CPU, graphs on and off, within the memory of its plan."""

import gc
from pathlib import Path

import pytest
import torch

from hybrid_rt import Engine
from hybrid_rt.gpu_attention import attention_context
from offload.cuda_backend import CudaBackend
from offload.graphs import GraphingBackend
from quant.errors import DeviceError

GIB = 2**30
TOKENS = 300  # in prefill: more than attention absorbs


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(0, 400, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()


def load(model: str | Path, device: str) -> Engine:
    return Engine.load(model, device=device, gpu_mem="4G" if device == "cuda" else None, context=1024)


@pytest.mark.parametrize("model", ["nano-r1", "nano-r1-fp8"])
def test_logits_are_those_of_the_cpu(model: str, ids: list[int]) -> None:
    """bfloat16 on both; the CPU rounds activations of packed weights to 8 bits, which is most of the difference."""
    on_gpu, on_cpu = (load(model, device).logits(ids).log_softmax(-1) for device in ("cuda", "cpu"))
    divergence = (on_cpu.exp() * (on_cpu - on_gpu)).sum(-1).mean()
    print(f"{model}: KL divergence {divergence:.2e}")
    assert divergence < 0.02
    assert (on_gpu.argmax(-1) == on_cpu.argmax(-1)).float().mean() > 0.9


def test_decoding_is_the_same_with_graphs_and_without(ids: list[int]) -> None:
    """Bit for bit: a graph runs the same kernels."""
    engine = load("nano-r1", "cuda")
    assert isinstance(engine.backend, GraphingBackend)
    recorded, plain = engine.new_cache(512), engine.new_cache(512)
    for cache in (recorded, plain):
        engine.forward(torch.tensor(ids[:200]), cache)
    for token in ids[200:220]:
        step = torch.tensor([token])
        with_graph = engine.forward(step, recorded)
        without = engine.forward(step, plain, hooked=True)
        assert torch.equal(with_graph, without)
    assert recorded.graphs is not None and plain.graphs is None


def test_decoding_gives_the_logits_of_prefill(ids: list[int]) -> None:
    engine = load("nano-r1", "cuda")
    whole = engine.logits(ids[:40])
    cache = engine.new_cache(64)
    engine.forward(torch.tensor(ids[:30]), cache)
    for position in range(30, 40):
        states = engine.forward(torch.tensor(ids[position : position + 1]), cache)
        close = engine.head(states)[0].log_softmax(-1) - whole[position].log_softmax(-1)
        assert close.abs().max() < 0.1


def test_memory_is_what_the_plan_says(ids: list[int]) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine = load("nano-r1", "cuda")
    cache, plan = engine.new_cache(1024), engine.plan
    weights = torch.cuda.memory_allocated() - before
    planned = plan.weight_bytes("gpu") + plan.cache_bytes
    print(f"weights and cache: {weights} bytes, planned {planned}")
    assert weights <= planned * 1.05 + 512 * 1000  # tensors take whole units of the allocator
    engine.forward(torch.tensor(ids), cache)
    taken = torch.cuda.max_memory_allocated() - before - weights
    print(f"workspace: {taken} bytes, planned {plan.workspace_bytes}")
    assert taken <= plan.workspace_bytes


def test_a_budget_of_24_gib_holds_on_a_larger_card() -> None:
    """The allocator refuses more, and the sentence names the budget."""
    total = torch.cuda.mem_get_info()[1]
    budget = min(24 * GIB, total // 2)
    backend = CudaBackend(budget)
    kept = [backend.allocate((GIB // 2,), torch.uint8)]
    with pytest.raises(DeviceError, match="the budget is"):
        while True:
            kept.append(backend.allocate((GIB // 2,), torch.uint8))
    assert sum(tensor.nbytes for tensor in kept) <= budget
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_work_on_the_host_is_in_the_order_of_its_stream() -> None:
    backend = CudaBackend(GIB)
    side, ready, done = backend.stream("side"), backend.event(), backend.event()
    x = torch.arange(1 << 20, dtype=torch.float32, device=backend.device)
    host, out = backend.allocate(x.shape, x.dtype, pinned=True), backend.allocate(x.shape, x.dtype)
    for factor in range(1, 20):
        y = x * factor
        backend.record(ready, backend.main)
        backend.wait(ready, side)
        backend.copy(host, y, side)
        backend.launch(side, host.add_, 1)
        backend.record(done, side)
        backend.wait(done, backend.main)
        backend.copy(out, host, backend.main)
        assert torch.equal(out, y + 1)

    def fail() -> None:
        raise IndexError("told")

    backend.launch(side, fail)
    with pytest.raises(IndexError, match="told"):
        backend.synchronize()


def test_long_prompts_continue_in_chunks(ids: list[int]) -> None:
    engine = load("nano-r1", "cuda")
    cache = engine.new_cache(1024)
    context = attention_context(cache, 4, engine.scale)
    assert context.positions.is_cuda
    whole = engine.head(engine.forward(torch.tensor(ids), engine.new_cache(1024)))
    for chunk in torch.tensor(ids).split(150):
        states = engine.forward(chunk, cache)
    assert (engine.head(states)[-1] - whole[-1]).abs().max() < 0.2

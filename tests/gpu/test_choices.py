"""What a plan may choose or a user ask for on a GPU: an 8-bit cache, streamed experts, deferred experts."""

from typing import Any

import pytest
import torch

from hybrid_rt import Engine
from offload.graphs import GraphingBackend

TOKENS = 300


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(0, 400, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()


def load(device: str, *pins: str, **options: Any) -> Engine:
    gpu_mem = "4G" if device == "cuda" else None
    return Engine.load("nano-r1", device=device, gpu_mem=gpu_mem, context=1024, pins=pins, **options)


def divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence of predictions, in nats."""
    log_p, log_q = reference.log_softmax(-1), found.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def decoded(engine: Engine, ids: list[int], prompt: int, hooked: bool = False) -> torch.Tensor:
    """Logits of the tokens behind a prompt, one pass each."""
    cache = engine.new_cache(len(ids))
    engine.forward(torch.tensor(ids[:prompt]), cache)
    steps = [engine.forward(torch.tensor([token]), cache, hooked) for token in ids[prompt:]]
    return engine.head(torch.cat(steps))


def test_a_cache_in_8_bits_is_near_one_in_16(ids: list[int]) -> None:
    """In prefill and in decoding, with graphs and without."""
    wide, narrow = load("cuda", "cache=bfloat16"), load("cuda", "cache=int8")
    assert narrow.plan.cache_format == "int8" and narrow.new_cache(4).data.dtype == torch.uint8
    assert narrow.plan.cache_bytes < 0.7 * wide.plan.cache_bytes
    assert divergence(wide.logits(ids), narrow.logits(ids)) < 0.02
    assert divergence(decoded(wide, ids, 280), decoded(narrow, ids, 280)) < 0.02
    assert isinstance(narrow.backend, GraphingBackend)
    assert torch.equal(decoded(narrow, ids, 280), decoded(narrow, ids, 280, hooked=True))


def test_streamed_experts_give_the_numbers_of_those_on_the_gpu(ids: list[int]) -> None:
    """The same kernels on the same records; only sums are in another order. And within the memory of the plan."""
    streamed, resident = (
        load("cuda", "experts=mapped", "stream=64", "chunk=256"),
        load("cuda", "experts=gpu", "chunk=256"),
    )
    assert streamed.plan.streaming is not None and resident.plan.streaming is None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = streamed.logits(ids)
    taken = torch.cuda.max_memory_allocated() - before
    print(f"cache and workspace: {taken} bytes, planned {streamed.plan.cache_bytes + streamed.plan.workspace_bytes}")
    assert taken <= streamed.plan.cache_bytes + streamed.plan.workspace_bytes
    assert divergence(resident.logits(ids), found) < 1e-3
    assert torch.equal(streamed.logits(ids), found)


def test_deferred_experts_are_those_of_the_cpu(ids: list[int]) -> None:
    """Nearer to the CPU's deferring than to no deferring; the same with graphs and without, and each time."""
    some = ids[:60]
    engine = load("cuda", "experts=mapped", defer_experts=3)
    found = decoded(engine, some, 20)
    assert torch.equal(found, decoded(engine, some, 20)) and torch.equal(found, decoded(engine, some, 20, hooked=True))
    same, without = (decoded(load("cpu", defer_experts=deferred), some, 20) for deferred in (3, 0))
    assert divergence(same, found) < divergence(without, found)

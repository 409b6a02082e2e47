"""Attention over the latent cache against plain NumPy in float64, and the memory it takes. Figures with `-s`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from hybrid_rt import latent_attention
from hybrid_rt.attention import MLA
from hybrid_rt.cache import LatentCache
from hybrid_rt.latent_attention import CachedAttention, attend_absorbed, attend_decompressed
from hybrid_rt.rope import Rope, softmax_scale
from offload.backend import CpuBackend
from quant import model_ops
from quant.config import parse_config
from quant.inventory import Inventory
from tests.tiny_checkpoint import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@torch.inference_mode()
def absorbed_by_kernel(*args: Any) -> torch.Tensor:
    """As it runs on a CPU: by a kernel, where outside of inference mode the formula runs."""
    return attend_absorbed(*args)


@torch.inference_mode()
def decompressed_by_kernel(*args: Any) -> torch.Tensor:
    return attend_decompressed(*args)


FORMS = [attend_decompressed, attend_absorbed, decompressed_by_kernel, absorbed_by_kernel]
BOTH_FORMS = pytest.mark.parametrize("attend", FORMS, ids=lambda form: form.__name__)


@dataclass(frozen=True)
class Sizes:
    """Of one attention: the last `queries` of `cached` tokens look at all up to themselves."""

    queries: int
    cached: int
    heads: int = 2
    nope: int = 8
    rope: int = 4
    value: int = 6
    lora: int = 12


@dataclass(frozen=True)
class Inputs:
    """What the attention functions take."""

    q_nope: torch.Tensor
    q_pe: torch.Tensor
    cached: torch.Tensor
    wkv_b: torch.Tensor
    scale: float

    def run(self, attend: Attend) -> torch.Tensor:
        return attend(self.q_nope, self.q_pe, self.cached, self.wkv_b, self.scale)


def random_inputs(sizes: Sizes, seed: int, draw: Callable[..., torch.Tensor] = torch.randn) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    return Inputs(
        q_nope=draw(sizes.queries, sizes.heads, sizes.nope, generator=rng),
        q_pe=draw(sizes.queries, sizes.heads, sizes.rope, generator=rng),
        cached=draw(sizes.cached, sizes.lora + sizes.rope, generator=rng),
        wkv_b=draw(sizes.heads, sizes.nope + sizes.value, sizes.lora, generator=rng),
        scale=(sizes.nope * sizes.lora) ** -0.5,
    )


def small_integers(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Whole numbers of which float32 computes all scores without rounding."""
    return torch.randint(-3, 4, shape, generator=generator).float()


def plain_attention(inputs: Inputs) -> tuple[np.ndarray, float]:
    """The definition, with the whole score matrix: the output [T, H, v] and its tolerance.

    An error of a score shifts the shares by as much, so the tolerance grows with the scores.
    """
    tensors = (inputs.q_nope, inputs.q_pe, inputs.cached, inputs.wkv_b)
    q_nope, q_pe, cached, wkv_b = (tensor.double().numpy() for tensor in tensors)
    lora, nope, queries = wkv_b.shape[2], q_nope.shape[2], len(q_nope)
    keys_values = np.einsum("sc,hdc->hsd", cached[:, :lora], wkv_b)
    scores = np.einsum("thd,hsd->hts", q_nope, keys_values[..., :nope]) + np.einsum(
        "thr,sr->hts", q_pe, cached[:, lora:]
    )
    scores *= inputs.scale
    largest = np.abs(scores).max()
    query = np.arange(len(cached) - queries, len(cached))
    scores[:, np.arange(len(cached)) > query[:, None]] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    values = keys_values[..., nope:]
    return np.einsum("hts,hsv->thv", shares, values), 2e-6 * (1 + largest) * np.abs(values).max()


def assert_right(inputs: Inputs, attend: Attend) -> None:
    expected, tolerance = plain_attention(inputs)
    np.testing.assert_allclose(inputs.run(attend).numpy(), expected, rtol=0, atol=tolerance)


@st.composite
def any_sizes(draw: st.DrawFn, most_cached: int = 3000) -> Sizes:
    queries = draw(st.integers(1, 40))
    width = st.integers(1, 24)
    return Sizes(
        queries=queries,
        cached=draw(st.integers(queries, max(queries, most_cached))),
        heads=draw(st.integers(1, 8)),
        nope=draw(width),
        rope=2 * draw(st.integers(1, 8)),
        value=draw(width),
        lora=draw(width),
    )


@BOTH_FORMS
@settings(max_examples=40, deadline=None)
@example(sizes=Sizes(1, 1), seed=0)
@example(sizes=Sizes(40, 40), seed=0)
@given(sizes=any_sizes(), seed=st.integers(0, 2**32))
def test_any_shape(attend: Attend, sizes: Sizes, seed: int) -> None:
    assert_right(random_inputs(sizes, seed), attend)


@BOTH_FORMS
@pytest.mark.parametrize("block", [latent_attention.PREFILL_BLOCK, latent_attention.DECODE_BLOCK])
@pytest.mark.parametrize("past", [-1, 0, 1, 5])
@pytest.mark.parametrize("queries", [1, 8, 9])
def test_around_the_end_of_a_block(attend: Attend, block: int, past: int, queries: int) -> None:
    assert_right(random_inputs(Sizes(queries, block + past), seed=past), attend)


@BOTH_FORMS
@settings(max_examples=40, deadline=None)
@example(block=1, sizes=Sizes(40, 40), seed=0)
@given(block=st.integers(1, 50), sizes=any_sizes(most_cached=200), seed=st.integers(0, 2**32))
def test_blocks_of_any_size(attend: Attend, block: int, sizes: Sizes, seed: int) -> None:
    """Blocks may be smaller than the chunk: then early queries see nothing of the last ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_attention, "PREFILL_BLOCK", block)
        patch.setattr(latent_attention, "DECODE_BLOCK", block)
        patch.setattr(model_ops, "LATENTS_TOGETHER", block)
        assert_right(random_inputs(sizes, seed), attend)


@BOTH_FORMS
@settings(max_examples=20, deadline=None)
@given(sizes=any_sizes(), exponent=st.integers(-4, 4), seed=st.integers(0, 2**32))
def test_huge_scores(attend: Attend, sizes: Sizes, exponent: int, seed: int) -> None:
    """Scores of thousands: exp would overflow without the running maximum. Exact, for they are whole numbers."""
    inputs = replace(random_inputs(sizes, seed, small_integers), scale=2.0**exponent)
    expected, _ = plain_attention(inputs)
    np.testing.assert_allclose(inputs.run(attend).numpy(), expected, rtol=1e-5, atol=1e-4)


@BOTH_FORMS
@pytest.mark.parametrize("largest_at", [0, 511, 512, 2047, 2048, 2999])
def test_one_key_far_above_all_others(attend: Attend, largest_at: int) -> None:
    """Earlier blocks are scaled down to nothing when it comes, and later ones add nothing."""
    inputs = random_inputs(Sizes(1, 3000, heads=1), seed=largest_at)
    inputs.cached[:, 12:] = 0
    inputs.cached[largest_at, 12:] = inputs.q_pe[0, 0] * 1e4
    value = inputs.wkv_b[0, 8:] @ inputs.cached[largest_at, :12]
    torch.testing.assert_close(inputs.run(attend)[0, 0], value, rtol=1e-5, atol=1e-5)


@BOTH_FORMS
def test_a_bfloat16_cache_costs_no_more_than_rounding_the_result(attend: Attend) -> None:
    inputs = random_inputs(Sizes(8, 2500, heads=4, nope=32, rope=16, value=32, lora=64), seed=0)
    halved = {name: getattr(inputs, name).bfloat16() for name in ("q_nope", "q_pe", "cached")}
    low = replace(inputs, **halved)
    expected, tolerance = plain_attention(low)
    ours = low.run(attend)
    assert ours.dtype == torch.bfloat16
    np.testing.assert_allclose(ours.float().numpy(), expected, rtol=2**-8, atol=tolerance)


class RandomParts:
    """Random weights of the shapes that the inventory tells (`Parts`)."""

    def __init__(self, inventory: Inventory, dtype: torch.dtype) -> None:
        self.inventory, self.dtype = inventory, dtype

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = self.inventory.by_name[name].shape
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype or self.dtype)

    def whole(self, name: str) -> Callable[[], torch.Tensor]:
        values = self.tensor(name, torch.float32)
        return lambda: values

    def linear(self, name: str) -> nn.Module:
        rows, columns = self.inventory.by_name[name].shape
        linear = nn.Linear(columns, rows, bias=False, dtype=self.dtype)
        linear.weight.data = self.tensor(name)
        return linear


QUARTER_OF_R1 = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "hidden_size": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 163840,
}


class Layer:
    """One attention layer with R1's ratios of widths, and a cache whose unused part is NaN."""

    def __init__(self, capacity: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.config = parse_config(tiny_config(QUARTER_OF_R1))
        self.attention = MLA(self.config, 0, RandomParts(Inventory.of(self.config), dtype))
        self.rope, self.scale, self.dtype = Rope(self.config), softmax_scale(self.config), dtype
        self.cache = LatentCache(self.config, capacity, dtype, CpuBackend())
        self.cache.data.fill_(float("nan"))

    def fill(self, tokens: int) -> None:
        self.cache.put(0, {"latents": torch.randn(1, tokens, self.config.latent_dim).to(self.dtype)})

    @torch.inference_mode()
    def append(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, dim] of tokens that follow what the cache holds; it does not count them as stored."""
        context = CachedAttention(self.cache, len(x), self.scale)
        return self.attention(x, self.rope(context.positions), context)


def test_a_layer_gives_the_same_in_pieces() -> None:
    x = torch.randn(60, 256)
    layer = Layer(64, torch.float32)
    whole = layer.append(x)
    pieces = []
    for piece in x.split([1, 20, 8, 9, 2, 20]):
        pieces.append(layer.append(piece))
        layer.cache.length += len(piece)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-5)
    assert layer.cache.data[0, 60:].isnan().all()


@pytest.mark.parametrize(("tokens", "form"), [(1, "absorbed"), (128, "absorbed"), (129, "decompressed")])
def test_the_number_of_tokens_decides_the_form(tokens: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in {"absorbed", "decompressed"} - {form}:
        monkeypatch.setattr(latent_attention, f"attend_{other}", None)
    assert Layer(256, torch.float32).append(torch.randn(tokens, 256)).isfinite().all()


def peak_bytes(run: Callable[[], object], folder: Path) -> int:
    """Most memory that torch's CPU allocator had given out at a time during `run`: kernels' own buffers included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    sizes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    assert sizes
    return int(np.cumsum(sizes).max())


def test_peak_bytes_counts_what_lives_at_a_time(tmp_path: Path) -> None:
    def run() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        torch.stack([second, second])

    assert peak_bytes(run, tmp_path) == 12000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [512, 1], ids=["prefill", "decode"])
def test_workspace_does_not_grow_with_the_context(tokens: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """One attention layer at 4096 and at 131072 tokens takes the same memory beside the cache, to the byte."""
    peaks = {}
    for context in (4096, 4096, 131072):  # once before, for what is allocated at first use
        layer = Layer(context, dtype)
        layer.fill(context - tokens)
        x = torch.randn(tokens, 256).to(dtype)
        peaks[context] = peak_bytes(lambda layer=layer, x=x: layer.append(x), tmp_path)
    print(f"{tokens} tokens in {dtype}: workspace {peaks}, cache {layer.cache.data.nbytes}")
    assert peaks[131072] == peaks[4096]

"""The GPU kernels' numbers against torch formulas: on a GPU where there is one, in Triton's interpreter elsewhere.

The judges (quant/gpu/reference.py) decode weights exactly and sum in float32. A kernel may differ by rounding to
bfloat16: of its result, of attention's shares, of `accurate`'s integers.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is missing; torch's wheels for CUDA and the extra `test` bring it")

from quant import fp8
from quant.gpu import launch, ops, reference, shapes
from quant.packed import PACKED_FORMATS, expert_record
from quant.packing import decode
from tests import interpreted_triton  # noqa: F401  mends the interpreter
from tests.test_packed_kernels import random_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = (*PACKED_FORMATS, "fp8_block", "bf16")
ROUNDING = 2**-8  # of values: half of a step of bfloat16, relative


class Weight(NamedTuple):
    """A matrix as kernels take it, and its exact values."""

    data: torch.Tensor
    scale: torch.Tensor | None
    name: str
    values: torch.Tensor


def random_weight(name: str, shape: tuple[int, int], seed: int = 0) -> Weight:
    """Random codes and scales, so that every code and subnormal is met."""
    rng = np.random.default_rng(seed)
    scale = None
    if name in PACKED_FORMATS:
        data = torch.from_numpy(random_packed(PACKED_FORMATS[name], shape, rng))
    elif name == "fp8_block":
        encoded = fp8.encode(
            torch.from_numpy(rng.normal(size=shape).astype(np.float32) * 2.0 ** rng.integers(-9, 1, shape))
        )
        data, scale = encoded.data, encoded.scale
    else:
        data = torch.from_numpy(rng.normal(size=shape)).bfloat16()
    values = reference.weights(data, scale, name, shape)
    return Weight(data.to(DEVICE), None if scale is None else scale.to(DEVICE), name, values.to(DEVICE))


def activations(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


def assert_close(found: torch.Tensor, expected: torch.Tensor, share: float = ROUNDING) -> None:
    """Root mean squares: the differences' is at most `share` of the values'. No difference is far above that."""
    found, expected = found.float(), expected.float()
    size = expected.square().mean().sqrt()
    error = found - expected
    assert error.square().mean().sqrt() <= share * size
    assert error.abs().max() <= 4 * share * expected.abs().max()


@pytest.mark.parametrize("name", PACKED_FORMATS)
@pytest.mark.parametrize("shape", [(16, 128), (40, 300), (7, 1000)])
def test_torch_decodes_packed_weights_as_numpy_does(name: str, shape: tuple[int, int]) -> None:
    data = random_packed(PACKED_FORMATS[name], shape, np.random.default_rng(3))
    found = reference.packed_weights(torch.from_numpy(data), PACKED_FORMATS[name], shape)
    assert np.array_equal(found.numpy(), decode(data, PACKED_FORMATS[name], shape))


def run_linear(x: torch.Tensor, weight: Weight, splits: int) -> torch.Tensor:
    (tokens, _), (rows, columns) = x.shape, weight.values.shape
    partial = torch.empty((splits, tokens, rows) if splits > 1 else (0,), device=DEVICE)
    return launch.linear(x, weight.data, weight.scale, weight.name, rows, columns, partial)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "splits"),
    [(1, 48, 1024, 3), (5, 33, 200, 1), (16, 32, 384, 2), (17, 64, 128, 1), (70, 80, 300, 1)],
)
def test_linear(name: str, tokens: int, rows: int, columns: int, splits: int) -> None:
    weight, x = random_weight(name, (rows, columns)), activations(tokens, columns)
    assert_close(run_linear(x, weight, splits), x.float() @ weight.values.T)


def test_fp8_codes_are_all_decoded_exactly() -> None:
    """One code a row, times 1: subnormals, both zeros and NaN among them."""
    codes = torch.arange(256, dtype=torch.uint8)
    data = torch.zeros(256, 128, dtype=torch.uint8)
    data[:, 5] = codes
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 5] = 1
    weight = Weight(data.view(torch.float8_e4m3fn).to(DEVICE), torch.ones(2, 1, device=DEVICE), "fp8_block", data)
    found = run_linear(x.to(DEVICE), weight, 1)[0].float().cpu().numpy()
    assert np.array_equal(found, fp8.decode_e4m3(codes.numpy()), equal_nan=True)


def test_splits_are_added_in_one_order() -> None:
    """The same call gives the same bits."""
    weight, x = random_weight("q8", (32, 1024)), activations(2, 1024)
    assert torch.equal(run_linear(x, weight, 4), run_linear(x, weight, 4))


HEADS, NOPE, VALUE, ROPE, LORA = 5, 32, 16, 16, 256


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 18])
def test_absorbing_and_projecting(name: str, tokens: int) -> None:
    weight = random_weight(name, (HEADS * (NOPE + VALUE), LORA))
    stored = weight[:3]
    q = activations(tokens, HEADS, NOPE + ROPE)[..., :NOPE]  # a view, as attention has it
    assert_close(launch.absorb(q, *stored, VALUE, LORA), reference.absorb(q, *stored, VALUE, LORA))
    latents = activations(tokens, HEADS, LORA)
    assert_close(launch.project(latents, *stored, NOPE, VALUE), reference.project(latents, *stored, NOPE, VALUE))


def random_cache(rows: int, lora: int, rope: int, in_bytes: bool) -> torch.Tensor:
    """Cache rows of bfloat16, or of bytes."""
    values = activations(rows, lora + rope, seed=7).cpu()
    if not in_bytes:
        return values.to(DEVICE)
    groups = values[:, :lora].float().unflatten(1, (-1, min(lora, 128)))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / scales).round().to(torch.int8).flatten(1)
    parts = (
        codes.view(torch.uint8),
        scales.flatten(1).view(torch.uint8),
        values[:, lora:].contiguous().view(torch.uint8),
    )
    return torch.cat(parts, dim=1).to(DEVICE)


def run_decode(q: torch.Tensor, q_pe: torch.Tensor, cached: torch.Tensor, seen: int, splits: int) -> torch.Tensor:
    tokens, heads, lora = q.shape
    partial = torch.full((splits, tokens, heads, lora), float("nan"), device=DEVICE)
    stats = torch.full((2, splits, tokens, heads), float("nan"), device=DEVICE)
    length = torch.tensor([seen], dtype=torch.int32, device=DEVICE)
    return launch.decode(q, q_pe, cached, length, 0.05, partial, stats)


@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize(
    ("seen", "tokens", "heads", "splits"),
    [(1, 1, 4, 3), (7, 3, 4, 2), (33, 1, 20, 1), (700, 2, 3, 5), (5000, 1, 17, 4)],
)
def test_decode_attention(seen: int, tokens: int, heads: int, splits: int, in_bytes: bool) -> None:
    """Rows of the cache behind `seen` are not read: they hold NaN."""
    cached = random_cache(seen, LORA, ROPE, in_bytes)
    roomy = torch.cat([cached, torch.full_like(cached[:40], 255 if in_bytes else float("nan"))])
    q, q_pe = activations(tokens, heads, LORA), activations(tokens, heads, ROPE, seed=2)
    length = torch.tensor([seen], device=DEVICE)
    expected = reference.decode(q, q_pe, cached, length, 0.05)
    assert_close(run_decode(q, q_pe, roomy, seen, splits), expected, 2 * ROUNDING)


def test_decode_attention_at_the_widths_of_r1() -> None:
    for in_bytes in (False, True):
        cached = random_cache(150, 512, 64, in_bytes)
        q, q_pe = activations(1, 40, 512), activations(1, 40, 64, seed=2)
        expected = reference.decode(q, q_pe, cached, torch.tensor([150], device=DEVICE), 0.05)
        assert_close(run_decode(q, q_pe, cached, 150, 2), expected, 2 * ROUNDING)


@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize(("seen", "tokens", "block"), [(130, 130, 1024), (300, 140, 128), (1100, 33, 1024)])
def test_prefill_attention(seen: int, tokens: int, block: int, in_bytes: bool) -> None:
    """Block by block against softmax over all scores at once."""
    heads, scale = 2 if seen < 1000 else 1, 0.1
    cached = random_cache(seen, 128, ROPE, in_bytes)
    q_nope, q_pe = activations(tokens, heads, NOPE + ROPE)[..., :NOPE], activations(tokens, heads, ROPE, seed=2)
    kv = activations(seen, heads, NOPE + VALUE, seed=3)
    sums, stats = torch.empty(tokens, heads, VALUE, device=DEVICE), torch.empty(2, tokens, heads, device=DEVICE)
    out = torch.empty(tokens, heads, VALUE, dtype=torch.bfloat16, device=DEVICE)
    expected, formula_sums, formula_stats = out.clone(), sums.clone(), stats.clone()
    for first in range(0, seen, block):
        launch.prefill(q_nope, q_pe, kv[first : first + block], cached, first, scale, sums, stats, out)
    for first in range(0, seen, 50):
        formula = q_nope, q_pe, kv[first : first + 50], cached, first, scale, formula_sums, formula_stats, expected
        reference.prefill(*formula)
    assert_close(out, expected, 2 * ROUNDING)
    assert_close(expected, whole_attention(q_nope, q_pe, kv, reference.cache_rows(cached, 128)[:, 128:], scale))


def whole_attention(
    q_nope: torch.Tensor, q_pe: torch.Tensor, kv: torch.Tensor, k_pe: torch.Tensor, scale: float
) -> torch.Tensor:
    """With all scores at once, by torch's own attention. [T, H, VALUE]."""
    tokens, seen = len(q_nope), len(kv)
    queries = torch.cat([q_nope, q_pe], -1).float().transpose(0, 1)
    keys = torch.cat([kv[..., :NOPE].float(), k_pe[:, None].expand(-1, kv.shape[1], -1)], -1).transpose(0, 1)
    mask = torch.ones(tokens, seen, dtype=torch.bool, device=DEVICE).tril(seen - tokens)
    heads = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, kv[..., NOPE:].float().transpose(0, 1), attn_mask=mask, scale=scale
    )
    return heads.transpose(0, 1)


@pytest.mark.parametrize(
    ("name", "tokens", "dim", "inter"),
    [
        ("fast", 1, 160, 72),
        ("accurate", 1, 128, 144),
        ("accurate", 40, 72, 144),
        ("q8", 30, 136, 48),
        ("fast+q8", 5, 128, 80),
    ],
)
def test_experts(name: str, tokens: int, dim: int, inter: int) -> None:
    """Some of a token's experts are elsewhere, some tokens have none here."""
    count, top_k = 4, 3
    record = expert_record(name, dim, inter)
    rng = np.random.default_rng(5)
    records = torch.zeros(count, record.nbytes, dtype=torch.uint8)
    for row in records:
        up = (inter, dim)
        for first, shape, fmt in (
            (record.w1, up, record.format),
            (record.w3, up, record.format),
            (record.w2, (dim, inter), record.down_format),
        ):
            packed = random_packed(fmt, shape, rng)
            row[first : first + len(packed)] = torch.from_numpy(packed)
    records = records.to(DEVICE)
    x = activations(tokens, dim) / 64  # random codes are large
    weights = torch.rand(tokens, top_k).to(DEVICE)
    here = torch.from_numpy(rng.integers(-1, count, (tokens, top_k), dtype=np.int32)).to(DEVICE)
    config, _ = shapes.expert_configs(here.numel(), count, record.format.name)
    blocks = ops.sort_pairs(here, count, config.m)
    hidden = torch.full((len(blocks[1]), inter), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    outputs = torch.full((tokens * top_k, dim), float("nan"), device=DEVICE)
    found = launch.experts(x, weights, records, here, *blocks, name, inter, hidden, outputs)
    assert_close(found, reference.experts(x, weights, records, here, record), 4 * ROUNDING)


def test_pairs_are_sorted_into_blocks_of_one_expert() -> None:
    here = torch.tensor([[2, -1], [0, 2], [2, 2], [-1, 0]], dtype=torch.int32)
    experts, slots = ops.sort_pairs(here, 3, 2)
    assert experts.tolist() == [0, 2, 2, -1, -1, -1, -1]
    assert slots.tolist()[:6] == [2, 7, 0, 3, 4, 5] and set(slots.tolist()[6:]) == {8}

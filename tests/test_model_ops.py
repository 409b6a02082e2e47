"""The model's small steps: CPU kernels against their formulas, and which of the two runs where."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from hybrid_rt.attention import make_latents
from hybrid_rt.cache import copy_rows
from hybrid_rt.gate import route
from hybrid_rt.latent_attention import attend_absorbed, attend_decompressed
from hybrid_rt.layers import add, rms_norm, silu_times
from hybrid_rt.rope import turn_pairs
from offload.emulate import TEMPORARIES, EmulatedBackend, Ledger
from quant.conversion import as_float32, converted
from quant.encoding import encode
from quant.kernels import set_threads, thread_count
from quant.packed import HEAD_FORMATS, PackedFormat

pytestmark = pytest.mark.usefixtures("one_thread")

Operator = Callable[..., Any]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**32)
LARGE = 2**26  # values enough that two threads share the work


@pytest.fixture(params=[1, 2], autouse=True, scope="module")
def kernel_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = thread_count()
    set_threads(request.param)
    yield request.param
    set_threads(before)


@torch.inference_mode()
def by_kernel(operator: Operator, *args: Any) -> Any:
    return operator(*args)


def assert_alike(operator: Operator, *args: Any) -> None:
    """Kernel and formula give the same but for the rounding of float32, or one step of bfloat16."""
    expected, ours = operator(*args), by_kernel(operator, *args)
    assert ours.dtype == expected.dtype and ours.shape == expected.shape and ours.is_contiguous()
    tolerance = 2**-7 if ours.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=2e-6)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), dim=st.integers(1, 600), gap=st.integers(0, 9), dtype=DTYPES, seed=SEEDS)
def test_rms_norm(rows: int, dim: int, gap: int, dtype: torch.dtype, seed: int) -> None:
    x = randn(rows, dim + gap, seed=seed, dtype=dtype)[:, :dim] * 3
    assert_alike(rms_norm, x, randn(dim, seed=seed + 1), 1e-6)


def test_rms_norm_of_large_small_and_broken_values() -> None:
    weight = torch.ones(32)
    for size in (0.0, 1e-12, 1e4, 1e15):
        assert_alike(rms_norm, torch.full((1, 32), size), weight, 1e-6)
    assert by_kernel(rms_norm, torch.full((1, 32), float("nan")).bfloat16(), weight, 1e-6).isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 9),
    pairs=st.integers(1, 40),
    before=st.integers(0, 20),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_turn_pairs(tokens: int, heads: int, pairs: int, before: int, dtype: torch.dtype, seed: int) -> None:
    """Bit by bit: products and sums are rounded alike."""
    x = randn(tokens, heads, before + 2 * pairs, seed=seed, dtype=dtype)[..., before:]
    angles = randn(tokens, pairs, seed=seed + 1)
    args = (x, angles.cos(), angles.sin())
    assert torch.equal(by_kernel(turn_pairs, *args), turn_pairs(*args))


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 40), lora=st.integers(1, 90), pairs=st.integers(1, 20), dtype=DTYPES, seed=SEEDS)
def test_make_latents(tokens: int, lora: int, pairs: int, dtype: torch.dtype, seed: int) -> None:
    angles = randn(tokens, pairs, seed=seed)
    kv = randn(tokens, lora + 2 * pairs, seed=seed + 1, dtype=dtype)
    assert_alike(make_latents, kv, randn(lora, seed=seed + 2), 1e-6, angles.cos(), angles.sin())


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 600), dtype=DTYPES, seed=SEEDS)
def test_steps_by_value(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    a, b = (randn(rows, columns, seed=seed + number, dtype=dtype) * 4 for number in (0, 1))
    assert torch.equal(by_kernel(add, a, b), a + b)
    silu, ours = silu_times(a.float(), b.float()), by_kernel(silu_times, a, b)
    torch.testing.assert_close(ours.float(), silu, rtol=2**-8 if dtype == torch.bfloat16 else 2e-6, atol=1e-6)
    target = torch.zeros(rows, columns + 3, dtype=dtype)
    by_kernel(copy_rows, target[:, 2:-1], a)
    assert torch.equal(target[:, 2:-1], a) and not target[:, :2].any() and not target[:, -1].any()
    for other in (torch.float32, torch.bfloat16):
        assert torch.equal(converted(a, other), a.to(other))
    assert converted(a, dtype) is a and torch.equal(as_float32(a.T), a.T.float())


def test_rounding_to_bfloat16_keeps_nan_and_infinity() -> None:
    odd = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.4e38, -0.0, 1e-45, 1.00390625, 1.01171875]])
    torch.testing.assert_close(converted(odd, torch.bfloat16), odd.bfloat16(), rtol=0, atol=0, equal_nan=True)
    bits = torch.tensor([[0x7FFFFFFF, -1, 0x7F800001]], dtype=torch.int32).view(torch.float32)
    assert converted(bits, torch.bfloat16).isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    shape=st.sampled_from([(1, 1, 6), (4, 2, 5), (8, 4, 8), (8, 8, 1), (3, 1, 20)]),
    group_size=st.integers(20, 40),
    dim=st.integers(1, 100),
    normalise=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_route(
    tokens: int,
    shape: tuple[int, int, int],
    group_size: int,
    dim: int,
    normalise: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    groups, limited, top_k = shape
    weight = randn(groups * group_size, dim, seed=seed) / dim**0.5
    args = (randn(tokens, dim, seed=seed + 1, dtype=dtype), weight, randn(len(weight), seed=seed + 2) / 8)
    rest = (groups, limited, top_k, normalise, 2.5)
    (ids, weights), (our_ids, our_weights) = route(*args, *rest), by_kernel(route, *args, *rest)
    (ids, order), (our_ids, our_order) = ids.sort(dim=-1), our_ids.sort(dim=-1)
    same = (ids == our_ids).all(-1)
    assert same.float().mean() >= 1 - 2 / tokens  # experts nearly alike may take each other's place
    for chosen in our_ids.tolist():
        assert len(set(chosen)) == top_k and len({expert // group_size for expert in chosen}) <= limited
    torch.testing.assert_close(our_weights.gather(-1, our_order)[same], weights.gather(-1, order)[same])


def test_equal_experts_are_taken_in_order_of_their_ids() -> None:
    ids, weights = by_kernel(route, torch.zeros(2, 4), torch.zeros(32, 4), torch.zeros(32), 4, 2, 3, True, 1.0)
    assert ids.tolist() == [[16, 17, 18]] * 2 or ids.tolist() == [[0, 1, 2]] * 2
    assert weights.tolist() == [[pytest.approx(1 / 3)] * 3] * 2


def attention_inputs(tokens: int, seen: int, dtype: torch.dtype, heads: int = 5) -> tuple[Any, ...]:
    """With R1's widths."""
    q = randn(tokens, heads, 192, seed=0, dtype=dtype)
    q_nope, q_pe = q.split([128, 64], dim=-1)
    wkv_b = randn(heads, 256, 512, seed=1) / 512**0.5
    return q_nope, q_pe, randn(seen, 576, seed=2, dtype=dtype), wkv_b, 192**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "seen"), [(1, 1), (1, 63), (1, 64), (1, 65), (1, 1000), (3, 70), (33, 40), (128, 300)]
)
def test_both_forms_of_attention(tokens: int, seen: int, dtype: torch.dtype) -> None:
    q_nope, q_pe, cached, wkv_b, scale = attention_inputs(tokens, seen, dtype)
    for form in (attend_absorbed, attend_decompressed):
        assert_alike(form, q_nope, q_pe, cached, wkv_b, scale)
        assert_alike(form, q_nope, q_pe, cached, wkv_b.bfloat16(), scale)


def packed_heads(fmt: PackedFormat, heads: int, rows: int, lora: int) -> torch.Tensor:
    """A random wkv_b in the form in which a store holds it."""
    data = encode(randn(heads * rows, lora, seed=3) / lora**0.5, fmt)
    return data.view(heads, rows // 16, lora // 128, fmt.block_bytes)


@pytest.mark.parametrize("fmt", HEAD_FORMATS.values(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(("tokens", "sizes"), [(1, (16, 16, 128)), (5, (48, 32, 256)), (3, (128, 128, 512))])
def test_packed_heads(tokens: int, sizes: tuple[int, int, int], fmt: PackedFormat) -> None:
    """Absorbed, they are read exactly; decompressed, as every packed matrix is, with latents of 8 bits."""
    (nope, value, lora), heads = sizes, 3
    q = randn(tokens, heads, nope + 6, seed=0)
    cached, wkv_b = randn(70, lora + 6, seed=2), packed_heads(fmt, heads, nope + value, lora)
    args = (q[..., :nope], q[..., nope:], cached, wkv_b, (nope + 6) ** -0.5)
    assert_alike(attend_absorbed, *args)
    expected, ours = attend_decompressed(*args), by_kernel(attend_decompressed, *args)
    assert (expected - ours).square().sum() < 1e-3 * expected.square().sum()
    torch.testing.assert_close(attend_absorbed(*args), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [attend_absorbed, attend_decompressed], ids=["absorbed", "decompressed"])
def test_a_token_gets_the_same_bits_alone_and_among_others(form: Operator) -> None:
    q_nope, q_pe, cached, wkv_b, scale = attention_inputs(9, 150, torch.float32)
    together = by_kernel(form, q_nope, q_pe, cached, wkv_b, scale)
    for token in range(9):
        alone = slice(token, token + 1)
        seen = cached[: 150 - 8 + token]
        assert torch.equal(by_kernel(form, q_nope[alone], q_pe[alone], seen, wkv_b, scale), together[alone])


def test_broken_queries_and_latents_show_where_they_are_seen() -> None:
    for form in (attend_absorbed, attend_decompressed):
        q_nope, q_pe, cached, wkv_b, scale = attention_inputs(2, 100, torch.float32)
        q_nope = q_nope.clone()
        q_nope[0, 3] = float("nan")
        out = by_kernel(form, q_nope, q_pe, cached, wkv_b, scale)
        assert out[0, 3].isnan().all() and out.isnan().sum() == 128
        cached[50, 7] = float("inf")
        assert not by_kernel(form, q_nope[1:], q_pe[1:], cached, wkv_b, scale).isfinite().any()


def test_threads_do_not_change_bits(kernel_threads: int) -> None:
    x, angles = randn(600, 4096, seed=0), randn(600, 32, seed=1)
    cases: list[tuple[Any, ...]] = [
        (rms_norm, x, randn(4096, seed=2), 1e-6),
        (turn_pairs, x.view(600, 64, 64), angles.cos(), angles.sin()),
        (route, x, randn(64, 4096, seed=3), randn(64, seed=4), 8, 4, 8, True, 2.5),
        (attend_absorbed, *attention_inputs(4, 300, torch.bfloat16)),
        (attend_decompressed, *attention_inputs(200, 300, torch.bfloat16)),
    ]
    for operator, *args in cases:
        ours = by_kernel(operator, *args)
        set_threads(3 - kernel_threads)
        other = by_kernel(operator, *args)
        set_threads(kernel_threads)
        assert all(map(torch.equal, ours, other)) if isinstance(ours, tuple) else torch.equal(ours, other)


def test_gradients_are_the_formulas() -> None:
    x, weight = randn(3, 8, seed=0).requires_grad_(), torch.ones(8, requires_grad=True)
    rms_norm(x, weight, 1e-6).square().sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    router = randn(8, 8, seed=1).requires_grad_()
    route(x, router, torch.zeros(8), 2, 1, 2, True, 1.0)[1][:, 0].sum().backward()
    assert router.grad is not None and router.grad.abs().sum() > 0


def test_fake_tensors_of_another_device_go_through_the_formulas() -> None:
    with FakeTensorMode(), torch.inference_mode():
        x = torch.empty(3, 64, dtype=torch.bfloat16, device="cuda")
        f32 = {"device": "cuda"}
        normed = rms_norm(x, torch.empty(64, **f32), 1e-6)
        assert (normed.shape, normed.dtype, normed.device.type) == (x.shape, x.dtype, "cuda")
        ids, weights = route(x, torch.empty(16, 64, **f32), torch.empty(16, **f32), 4, 2, 3, True, 1.0)
        assert ids.shape == weights.shape == (3, 3) and ids.device.type == "cuda"


def test_an_emulated_gpu_counts_the_formulas_temporaries() -> None:
    backend = EmulatedBackend(Ledger(LARGE))
    x = randn(4, 1024, seed=0, dtype=torch.bfloat16)
    with torch.inference_mode(), backend.counting():
        kept = rms_norm(x, torch.ones(1024), 1e-6)
    assert backend.ledger.used_by[TEMPORARIES] == kept.nbytes
    assert backend.ledger.peak_by[TEMPORARIES] >= 2 * 4 * 1024 * 4  # in float32


@pytest.mark.parametrize(
    ("operator", "args", "message"),
    [
        (rms_norm, (torch.ones(2, 4).half(), torch.ones(4), 1e-6), "must be float32 or bfloat16 of 2 dimensions"),
        (rms_norm, (torch.ones(4, 2).T, torch.ones(4), 1e-6), "the last one without gaps"),
        (rms_norm, (torch.ones(2, 4), torch.ones(3), 1e-6), "a norm's weight must be contiguous float32"),
        (turn_pairs, (torch.ones(2, 1, 4), torch.ones(2, 1), torch.ones(2, 1)), "cosines and sines must be"),
        (route, (torch.ones(1, 4), torch.ones(8, 4), torch.ones(8), 4, 1, 3, True, 1.0), "3 of 8 experts in 1 of 4"),
        (add, (torch.ones(2, 4), torch.ones(4, 2)), "are not alike"),
        (add, (torch.ones(2, 4), torch.ones(4, 2).T), "without gaps"),
        (copy_rows, (torch.ones(2, 4), torch.ones(2, 3)), "does not fit"),
        (
            attend_absorbed,
            (*attention_inputs(1, 1, torch.float32)[:3], torch.zeros(5, 16, 4, 1152, dtype=torch.uint8), 1.0),
            "do not fit together",
        ),
        (
            attend_absorbed,
            (torch.ones(2, 1, 4), torch.ones(2, 1, 2), torch.ones(1, 8), torch.ones(1, 8, 6), 1.0),
            "do not fit together",
        ),
    ],
)
def test_what_no_kernel_may_read_is_refused(operator: Operator, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_kernel(operator, *args)

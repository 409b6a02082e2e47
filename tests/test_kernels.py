"""Kernels against their NumPy references, and what they promise: exact decoding, one order of sums, no copies."""

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch._subclasses import FakeTensorMode

from quant import ops
from quant.formats import BF16, F32, FP8_BLOCK, Format, QuantTensor
from quant.kernels import reference, set_threads, thread_count
from quant.kernels.silu import exp as kernel_exp
from quant.kernels.threads import MAX_THREADS, SERIAL_MULTIPLICATIONS, parts_for
from quant.kernels.vector import FP8_CODE, make_dot

FORMATS = (F32, BF16, FP8_BLOCK)
ROOT = Path(__file__).parent.parent
# Rounding of float32 sums: a 1 % mistake in one of a thousand values would show.
TOLERANCE = 1e-11


@numba.njit
def exp(x):  # type: ignore[no-untyped-def]
    return kernel_exp(x)


pytestmark = pytest.mark.usefixtures("one_kernel_thread")


def make_weight(fmt: Format, rows: int, columns: int, rng: np.random.Generator) -> QuantTensor:
    """A matrix whose products with N(0, 1) are near 1; some FP8 blocks have scale 0, some values are subnormal."""
    values = torch.from_numpy(rng.standard_normal((rows, columns), dtype=np.float32)) / columns**0.5
    if fmt.block is None:
        return QuantTensor(fmt, (rows, columns), values.to(fmt.dtype))
    shape = fmt.scale_shape((rows, columns))
    assert shape is not None
    scale = torch.from_numpy(rng.uniform(0.5, 2, shape).astype(np.float32))
    scale[torch.from_numpy(rng.uniform(size=shape) < 0.1)] = 0
    return QuantTensor(fmt, (rows, columns), values.to(fmt.dtype), scale)


def values_of(weight: QuantTensor) -> NDArray[np.float64]:
    """The reference's view of a weight, decoded from its bits in NumPy."""
    if weight.format is FP8_BLOCK:
        assert weight.scale is not None
        return reference.dequantize_fp8(weight.data.view(torch.uint8).numpy(), weight.scale.numpy())
    if weight.format is BF16:
        return reference.decode_bf16(weight.data.view(torch.uint16).numpy())
    return weight.data.numpy().astype(np.float64)


def assert_close(actual: torch.Tensor, expected: NDArray[np.float64], squares: float = 0.0) -> None:
    """Squared error relative to the squares of what was expected; float32 loses what is below its normal numbers.

    squares: of the terms whose sums these are, where there may be so few sums that their terms happen to cancel.
    """
    error = float(((actual.double().numpy() - expected) ** 2).sum())
    size = max(float((expected**2).sum()), squares)
    lost = expected.size * float(np.finfo(np.float32).tiny) ** 2
    assert error <= TOLERANCE * size + lost, f"{error} of {size}"


class Moe:
    """A layer of random experts, and calls of the operator for it."""

    def __init__(self, fmt: Format, experts: int, dim: int, inter: int, rng: np.random.Generator) -> None:
        shapes = ((inter, dim), (inter, dim), (dim, inter))
        self.weights = [tuple(make_weight(fmt, *shape, rng) for shape in shapes) for _ in range(experts)]
        self.fmt, self.dim, self.inter = fmt, dim, inter
        tensors = [[w.data for w in expert] + [w.scale for w in expert] for expert in self.weights]
        self.table = torch.tensor([[0 if t is None else t.data_ptr() for t in row] for row in tensors])

    def arguments(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> list[Any]:
        sizes = ops.moe_scratch_sizes(x.shape[0], ids.shape[1], len(self.table), self.dim, self.inter)
        order, scratch = torch.empty(sizes[0], dtype=torch.int64), torch.full((sizes[1],), torch.nan)
        out = torch.full_like(x, torch.nan)
        return [x, ids, weights, self.table, self.inter, self.fmt.dtype, 1, order, scratch, out]

    def run(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        args = self.arguments(x, ids, weights)
        torch.ops.dsr1.moe_experts(*args)
        return args[-1]

    def expected(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> NDArray[np.float64]:
        experts = [(values_of(w1), values_of(w3), values_of(w2)) for w1, w3, w2 in self.weights]
        return reference.moe_experts(x.numpy(), ids.numpy(), weights.numpy(), experts)


def squares_of_terms(layer: Moe, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> float:
    """Squares of what a layer's outputs are sums of: of each expert's hidden values times its last matrix.

    Hidden values, too, are products of sums whose terms may happen to cancel.
    """
    total = 0.0
    for number, matrices in enumerate(layer.weights):
        w1, w2, w3 = values_of(matrices[0]), values_of(matrices[2]), values_of(matrices[1])
        tokens, slots = np.nonzero(ids.numpy() == number)
        rows = x.numpy()[tokens].astype(np.float64)
        with np.errstate(over="ignore"):
            gate, up = rows @ w1.T, rows @ w3.T
            gates, ups = (np.maximum(abs(sums), (rows**2 @ (w**2).T) ** 0.5) for sums, w in ((gate, w1), (up, w3)))
            hidden = gates / (1 + np.exp(-gate)) * ups
        total += float((weights.numpy()[tokens, slots, None] ** 2 * (hidden**2 @ (w2**2).T)).sum())
    return total


def routed(tokens: int, experts: int, top_k: int, dim: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """(x, ids, weights) with distinct experts for each token."""
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).reshape(tokens, top_k)
    x, weights = rng.standard_normal((tokens, dim), dtype=np.float32), rng.random((tokens, top_k), dtype=np.float32)
    return torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(weights)


def test_reference_decodes_every_fp8_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(reference.decode_fp8(codes.numpy()), codes.view(torch.float8_e4m3fn).double().numpy())


@pytest.mark.parametrize("tokens", [1, 3, 9])  # decoded on the way for one and for four tokens, and before
@pytest.mark.parametrize("flush", [False, True])
def test_every_fp8_code_is_exact(tokens: int, flush: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = QuantTensor(FP8_BLOCK, (256, 1), codes.reshape(256, 1), torch.tensor([[1.0], [0.37]]))
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        out = ops.linear(torch.ones(tokens, 1), weight)
    finally:
        torch.set_flush_denormal(False)
    expected = weight.dequantize(torch.float32).T.expand(tokens, 256)
    assert torch.equal(out.nan_to_num(777.0), expected.nan_to_num(777.0))
    assert out.isnan().sum() == 2 * tokens


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([1.0, 1e4, 1e-6]),
    st.integers(0, 2**32 - 1),
)
@example(FP8_BLOCK, 1, 129, 257, 1.0, 0)
@example(FP8_BLOCK, 5, 128, 128, 1.0, 0)
@example(BF16, 300, 1, 1, 1e4, 0)
def test_linear(fmt: Format, tokens: int, rows: int, columns: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = make_weight(fmt, rows, columns, rng)
    x = torch.from_numpy(rng.standard_normal((tokens, columns), dtype=np.float32)) * size
    assert_close(ops.linear(x, weight), reference.linear(x.numpy(), values_of(weight)))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.one_of(st.integers(1, 12), st.integers(13, 300)),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 200),
    st.integers(1, 150),
    st.sampled_from([1.0, 1e4]),
    st.integers(0, 2**32 - 1),
)
@example(FP8_BLOCK, 1, 32, 4, 256, 64, 1.0, 0)
@example(FP8_BLOCK, 64, 5, 2, 150, 130, 1e4, 0)
@example(F32, 1, 3, 2, 1, 145, 1e4, 145)  # one output, of terms that cancel
@example(FP8_BLOCK, 1, 1, 1, 133, 1, 1e4, 1)  # one hidden value, of a gate far below 0
def test_moe_experts(
    fmt: Format, tokens: int, experts: int, top_k: int, dim: int, inter: int, size: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    layer = Moe(fmt, experts, dim, inter, rng)
    x, ids, weights = routed(tokens, experts, min(top_k, experts), dim, rng)
    inputs = (x * size, ids, weights)
    assert_close(layer.run(*inputs), layer.expected(*inputs), squares_of_terms(layer, *inputs))


def test_moe_experts_that_nobody_or_everybody_chose() -> None:
    rng = np.random.default_rng(3)
    layer = Moe(FP8_BLOCK, 7, 64, 32, rng)
    x, ids, weights = routed(30, 7, 2, 64, rng)
    ids[:, 0], ids[:, 1] = 6, 2
    assert_close(layer.run(x, ids, weights), layer.expected(x, ids, weights))
    ids[:, 1] = 6  # the same expert twice
    assert_close(layer.run(x, ids, weights), layer.expected(x, ids, weights))
    assert layer.run(x[:0], ids[:0], weights[:0]).shape == (0, 64)


def test_moe_sums_in_the_order_of_expert_ids() -> None:
    rng = np.random.default_rng(4)
    layer = Moe(BF16, 16, 48, 24, rng)
    x, ids, weights = routed(9, 16, 6, 48, rng)
    order = ids.argsort(1)
    in_order = layer.run(x, ids.gather(1, order), weights.gather(1, order))
    assert torch.equal(layer.run(x, ids, weights), in_order)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_results_do_not_depend_on_threads_or_on_the_run(fmt: Format) -> None:
    rng = np.random.default_rng(5)
    weight, layer = make_weight(fmt, 333, 520, rng), Moe(fmt, 8, 264, 200, rng)
    x, ids, weights = routed(70, 8, 4, 264, rng)
    wide = torch.randn(70, 520)
    assert parts_for(70 * 333 * 520) == 1 < 70 * 333 * 520 / SERIAL_MULTIPLICATIONS
    results = []
    for count in (1, 1, 2, 3, 2):
        set_threads(count)
        results.append((ops.linear(wide, weight), layer.run(x, ids, weights)))
    for linear_out, moe_out in results:
        assert torch.equal(linear_out, results[0][0]) and torch.equal(moe_out, results[0][1])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_token_alone_gets_the_same_bits_as_among_others(fmt: Format) -> None:
    rng = np.random.default_rng(6)
    weight, layer = make_weight(fmt, 70, 300, rng), Moe(fmt, 6, 130, 70, rng)
    x, ids, weights = routed(40, 6, 3, 130, rng)
    wide = torch.randn(40, 300)
    linear_out, moe_out = ops.linear(wide, weight), layer.run(x, ids, weights)
    for size in (1, 2, 4, 7):
        part = slice(11, 11 + size)
        assert torch.equal(ops.linear(wide[part], weight), linear_out[part])
        assert torch.equal(layer.run(x[part], ids[part], weights[part]), moe_out[part])


def test_infinity_and_nan_arrive() -> None:
    weight = QuantTensor(F32, (2, 20), torch.ones(2, 20))
    x = torch.zeros(3, 20)
    x[0, 3], x[1, 3], x[2, 19] = torch.inf, -torch.inf, torch.nan
    out = ops.linear(x, weight)
    assert out[0].tolist() == [torch.inf] * 2 and out[1].tolist() == [-torch.inf] * 2 and out[2].isnan().all()


@numba.njit
def exp_of(values):  # type: ignore[no-untyped-def]
    return np.array([exp(value) for value in values])


def test_exp_is_within_two_units_of_the_last_place() -> None:
    x = np.linspace(-87, 88, 200001).astype(np.float32)
    actual, expected = exp_of(x), np.exp(x.astype(np.float64))
    assert np.max(np.abs(actual - expected) / expected) < 2 * 2.0**-23
    high, low = exp_of(np.array([1000, -1000], np.float32))
    assert high == np.inf and 0 <= low < 1e-37


def test_linear_keeps_leading_dimensions_and_dtype() -> None:
    weight = make_weight(BF16, 12, 20, np.random.default_rng(0))
    x = torch.randn(2, 3, 20).bfloat16()
    out = ops.linear(x, weight)
    assert out.shape == (2, 3, 12) and out.dtype == torch.bfloat16
    assert torch.equal(out.reshape(6, 12), ops.linear(x.float().reshape(6, 20), weight).bfloat16())
    assert ops.linear(x[..., :0].reshape(2, 0, 20), weight).shape == (2, 0, 12)
    strided = torch.randn(20, 5).T
    assert torch.equal(ops.linear(strided, weight), ops.linear(strided.contiguous(), weight))


def fp8(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("x", "data", "scale", "message"),
    [
        (torch.ones(1, 20), torch.ones(3, 20, dtype=torch.float16), None, "no kernel reads"),
        (torch.ones(1, 20), torch.ones(20, 3).T, None, "contiguous matrix"),
        (torch.ones(1, 20), torch.ones(3, 21), None, "cannot be multiplied"),
        (torch.ones(1, 20, dtype=torch.int32), torch.ones(3, 20), None, "cannot be multiplied"),
        (torch.ones(20), torch.ones(3, 20), None, "cannot be multiplied"),
        (torch.ones(1, 20), torch.ones(3, 20), torch.ones(1, 1), "scales"),
        (torch.ones(1, 20), fp8(3, 20), None, "needs scales"),
        (torch.ones(1, 20), fp8(3, 20), torch.ones(1, 2), "scales of this weight"),
        (torch.ones(1, 20), fp8(3, 20), torch.ones(1, 1).double(), "scales of this weight"),
        (torch.ones(1, 20), fp8(300, 20), torch.ones(3, 2)[:, :1], "scales of this weight"),
    ],
)
def test_linear_refuses_what_it_cannot_read(
    x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.dsr1.linear(x, data, scale)


@pytest.mark.parametrize("bad", [-2, 4, 2**62, -(2**63)])
def test_moe_refuses_ids_out_of_range(bad: int) -> None:
    rng = np.random.default_rng(0)
    layer = Moe(F32, 4, 16, 8, rng)
    x, ids, weights = routed(3, 4, 2, 16, rng)
    ids[2, 1] = bad
    with pytest.raises(IndexError, match=r"outside -1 \.\. 3"):
        layer.run(x, ids, weights)


def test_moe_refuses_what_it_cannot_read() -> None:
    rng = np.random.default_rng(0)
    layer = Moe(F32, 4, 16, 8, rng)
    good = layer.arguments(*routed(3, 4, 2, 16, rng))
    bad = {
        0: [good[0].double(), good[0][:2], torch.randn(16, 3).T, good[0].to("meta")],
        1: [good[1].int(), good[1][:, :1].contiguous(), good[1][0]],
        2: [good[2].double(), good[2][:2]],
        3: [good[3][:, :5].contiguous(), good[3].double()],
        4: [0, -1],
        5: [torch.float16],
        6: [0, 2],  # only packed experts can be on several nodes
        7: [good[7][:5]],
        8: [good[8][:64]],
        9: [good[9][:2], good[9].bfloat16()],
    }
    for position, values in bad.items():
        for value in values:
            with pytest.raises(ValueError):
                torch.ops.dsr1.moe_experts(*good[:position], value, *good[position + 1 :])


def test_fake_tensors_pass_and_misplaced_ones_do_not() -> None:
    with FakeTensorMode():
        data, scale = torch.empty(300, 200, dtype=torch.float8_e4m3fn, device="cuda"), torch.empty(3, 2, device="cuda")
        weight = QuantTensor(FP8_BLOCK, (300, 200), data, scale)
        out = ops.linear(torch.empty(2, 5, 200, dtype=torch.bfloat16, device="cuda"), weight)
        assert out.shape == (2, 5, 300) and out.dtype == torch.bfloat16 and out.device.type == "cuda"
        with pytest.raises(ValueError, match="both must be on one device"):
            ops.linear(torch.empty(1, 200), weight)
        with pytest.raises(ValueError, match="cannot be multiplied"):
            ops.linear(torch.empty(1, 100, device="cuda"), weight)


def test_weights_are_not_copied(tmp_path: Path) -> None:
    rows, columns = 8192, 4096
    script = f"""
import torch
from quant import ops
from quant.formats import FP8_BLOCK, QuantTensor
from quant.kernels import set_threads
set_threads(1)
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
file = torch.from_file({str(tmp_path / "weights")!r}, True, {rows * columns}, dtype=torch.float8_e4m3fn)
scale = torch.ones({rows} // 128, {columns} // 128)
weight = QuantTensor(FP8_BLOCK, ({rows}, {columns}), file.view({rows}, {columns}), scale)
small = QuantTensor(FP8_BLOCK, (1, {columns}), weight.data[:1], weight.scale[:1])
x = torch.ones(16, {columns})
ops.linear(x, small)
before = anonymous()
for tokens in (1, 3, 16):
    ops.linear(x[:tokens], weight)
    print(anonymous() - before)
"""
    (tmp_path / "weights").write_bytes(bytes(rows * columns))
    if not Path("/proc/self/status").exists():
        pytest.skip("resident anonymous memory is read from /proc")
    grown = [int(line) for line in run_python(script).split()]
    assert max(grown) < rows * columns / 8


def run_python(script: str, cache: Path | None = None, **variables: str) -> str:
    """The output of a Python process of its own, which must succeed; `cache`: its user's cache folder."""
    folders = {} if cache is None else {"XDG_CACHE_HOME": str(cache), "LOCALAPPDATA": str(cache)}
    environment = {**os.environ, **folders, **variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dot_is_vector_code() -> None:
    if "x86" not in platform.machine().lower():
        pytest.skip("the instructions looked for are those of x86")
    dot = make_dot(FP8_CODE, 1)

    @numba.njit
    def multiply(row, x, scale, k, result):  # type: ignore[no-untyped-def]
        dot((row, row, row, row), (x,), scale, k, result)

    multiply.compile("void(int64, int64, int64, int64, int64)")
    (assembly,) = multiply.inspect_asm().values()
    vectors = [line for line in assembly.splitlines() if "vfmadd" in line and ("%ymm" in line or "%zmm" in line)]
    assert len(vectors) >= 4 and "vcvtph2ps" in assembly


@pytest.mark.parametrize("features", ["", "+avx2,+f16c,+fma"])
def test_older_processors_decode_and_multiply_exactly(features: str) -> None:
    script = """
import numba, numpy as np
from quant.kernels import reference
from quant.kernels.vector import FP8_CODE, make_decode, make_dot
decode, dot = make_decode(FP8_CODE), make_dot(FP8_CODE, 1)

@numba.njit
def run(row, scale, k, out, x, result):
    decode(row, scale, k, out)
    dot((row, row, row, row), (x,), scale, k, result)

codes, scale = np.arange(256, dtype=np.uint8), np.array([1.5, 0.25], np.float32)
out, result, x = np.empty(256, np.float32), np.empty(4, np.float32), np.ones(256, np.float32)
run(codes.ctypes.data, scale.ctypes.data, 256, out.ctypes.data, x.ctypes.data, result.ctypes.data)
expected = reference.dequantize_fp8(codes[None], scale[None])[0]
np.testing.assert_array_equal(out, expected)
run(codes.ctypes.data, scale.ctypes.data, 99, out.ctypes.data, x.ctypes.data, result.ctypes.data)
assert (result == expected[:99].sum()).all(), result
"""
    if "x86" not in platform.machine().lower():
        pytest.skip("these are processors of x86")
    run_python(script, NUMBA_CPU_NAME="haswell" if features else "generic", NUMBA_CPU_FEATURES=features)


def test_callers_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.kernels.threads.SERIAL_MULTIPLICATIONS", 0)
    set_threads(2)
    weight = make_weight(FP8_BLOCK, 200, 300, np.random.default_rng(0))
    x = torch.randn(8, 300)
    expected, results = ops.linear(x, weight), []
    work = [threading.Thread(target=lambda: results.extend(ops.linear(x, weight) for _ in range(20))) for _ in range(3)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(results) == 60 and all(torch.equal(result, expected) for result in results)


def test_loading_a_kernel_leaves_torch_its_threads() -> None:
    script = """
import torch
torch.set_num_threads(1)
from quant import ops
from quant.formats import F32, QuantTensor
ops.linear(torch.ones(300, 200), QuantTensor(F32, (100, 200), torch.ones(100, 200)))
print(torch.get_num_threads())
"""
    assert run_python(script).strip() == "1"


def test_set_threads_bounds() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        set_threads(0)
    set_threads(10**6)
    assert thread_count() == MAX_THREADS

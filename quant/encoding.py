"""Turn plain weights into packed ones: the way into the formats of quant/packed.py."""

from collections.abc import Sequence

import torch

from quant.encode_reference import ANCHORS
from quant.formats import BF16, F32, FP8_BLOCK, QuantTensor
from quant.kernels import encode as encode_kernel
from quant.kernels.decode import PACKED_CODES
from quant.kernels.threads import call, parts_for
from quant.kernels.vector import BF16_CODE, F32_CODE, FP8_CODE
from quant.packed import BLOCK_K, TILE_ROWS, PackedFormat, blocks_per_row, tiles

STRIP_WEIGHTS = 1 << 24  # made float32 and encoded at a time: 64 MiB, and tiles for many threads
LEAST_WEIGHT = 1 / 128  # of a column, relative to the mean
PLAIN_CODES = {F32.name: F32_CODE, BF16.name: BF16_CODE, FP8_BLOCK.name: FP8_CODE}
WORK = 64  # what a weight costs, in multiplications


class Errors:
    """Σ w², Σ e², Σ c w² and Σ c e² of what was encoded: weights w, errors e, and how much their columns count, c."""

    def __init__(self) -> None:
        self.sums = (0.0,) * encode_kernel.SUM_COUNT

    def add(self, sums: Sequence[float]) -> None:
        self.sums = tuple(one + other for one, other in zip(self.sums, sums, strict=True))


def encode(
    weight: torch.Tensor,
    fmt: PackedFormat,
    importance: torch.Tensor | None = None,
    errors: Errors | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """A matrix [N, K] of any float dtype, on the CPU, as uint8 [fmt.nbytes((N, K))].

    importance: how much squared errors in each column count, float32 [K], such as the mean square of what is multiplied
    with it (`column_weights`); by default alike. errors: what the errors are added to. threads: None for as many as
    pay. Beside its result it needs memory for a strip of rows at a time. ValueError for anything else, and for weights
    that are NaN, infinite or beyond float32.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.device.type != "cpu":
        what = f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"only a matrix [N, K] of floats on the CPU can be packed, not {what}")
    shape = (weight.shape[0], weight.shape[1])
    out = torch.empty(fmt.nbytes(shape), dtype=torch.uint8)
    columns = column_weights(importance, shape[1])
    strip_tiles = max(1, STRIP_WEIGHTS // (TILE_ROWS * max(1, shape[1])))
    for first in range(0, tiles(shape), strip_tiles):
        strip = weight[first * TILE_ROWS : (first + strip_tiles) * TILE_ROWS].detach().to(torch.float32).contiguous()
        rows = QuantTensor(F32, tuple(strip.shape), strip)
        _encode_rows(rows, fmt, columns, out[first * fmt.tile_bytes(shape) :], errors, threads)
    return out


def encode_published(
    rows: QuantTensor, fmt: PackedFormat, importance: torch.Tensor | None, errors: Errors
) -> torch.Tensor:
    """A matrix in FP8, bfloat16 or float32 as `encode` packs it, on this thread alone; only blocks are made float32."""
    out = torch.empty(fmt.nbytes(rows.shape), dtype=torch.uint8)
    _encode_rows(rows, fmt, column_weights(importance, rows.shape[1]), out, errors, threads=1)
    return out


def column_weights(importance: torch.Tensor | None, count: int) -> torch.Tensor:
    """What the search takes for `importance` [count], 0 or positive: float32, filled up to whole blocks with 1.

    All are 1 where there is none. Else they are relative to the mean, and within LEAST_WEIGHT .. 1 / LEAST_WEIGHT: a
    text that hardly uses a column does not say that others do not. Raises ValueError for values below 0, infinite
    ones, or too few or many.
    """
    weights = torch.ones(blocks_per_row((1, count)) * BLOCK_K)
    if importance is None:
        return weights
    if importance.shape != (count,) or not importance.isfinite().all() or (importance < 0).any():
        raise ValueError(f"the importance of {count} columns must be as many numbers of at least 0")
    mean = importance.double().mean()
    if mean > 0:
        weights[:count] = (importance / mean).clamp(LEAST_WEIGHT, 1 / LEAST_WEIGHT)
    return weights


def _encode_rows(
    rows: QuantTensor,
    fmt: PackedFormat,
    columns: torch.Tensor,
    out: torch.Tensor,
    errors: Errors | None,
    threads: int | None,
) -> None:
    """Raises ValueError for weights that are not finite: their squares' sum is not, either."""
    (n, k), parts = rows.shape, threads or parts_for(rows.data.numel() * WORK)
    scratch = torch.empty(parts * encode_kernel.SCRATCH_BYTES, dtype=torch.uint8)
    sums = torch.zeros(parts, encode_kernel.SUM_COUNT, dtype=torch.float64)
    table = encode_kernel.search_table(fmt)  # held here: of two threads that make it at once, one's is not kept
    tensors = (table.ctypes.data, *(tensor.data_ptr() for tensor in (out, scratch, columns, sums)))
    published = (rows.data.data_ptr(), 0 if rows.scale is None else rows.scale.data_ptr())
    codes = (PLAIN_CODES[rows.format.name], PACKED_CODES[fmt.name])
    call(encode_kernel.encode, (*published, *tensors, n, k, *codes, len(ANCHORS[fmt.name])), parts)
    total = sums.sum(0)
    if not total.isfinite().all():
        raise ValueError(f"weights that are NaN or infinite in float32 cannot be packed as {fmt.name}")
    if errors is not None:
        errors.add(total.tolist())

"""Turn plain weights into packed ones: the way into the formats of quant/packed.py."""

import torch

from quant.encode_reference import ANCHORS
from quant.kernels import encode as encode_kernel
from quant.kernels.decode import PACKED_CODES
from quant.kernels.threads import call, parts_for
from quant.packed import TILE_ROWS, PackedFormat, tiles

STRIP_WEIGHTS = 1 << 24  # made float32 and encoded at a time: 64 MiB, and tiles for many threads
WORK = 64  # what a weight costs, in multiplications


def encode(weight: torch.Tensor, fmt: PackedFormat, threads: int | None = None) -> torch.Tensor:
    """A matrix [N, K] of any float dtype, on the CPU, as uint8 [fmt.nbytes((N, K))].

    threads: None for as many as pay. Beside its result it needs memory for a strip of rows at a time. ValueError for
    anything else, and for weights that are NaN, infinite or beyond float32.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.device.type != "cpu":
        what = f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"only a matrix [N, K] of floats on the CPU can be packed, not {what}")
    shape = (weight.shape[0], weight.shape[1])
    out = torch.empty(fmt.nbytes(shape), dtype=torch.uint8)
    strip_tiles = max(1, STRIP_WEIGHTS // (TILE_ROWS * max(1, shape[1])))
    for first in range(0, tiles(shape), strip_tiles):
        strip = weight[first * TILE_ROWS : (first + strip_tiles) * TILE_ROWS].detach()
        _encode_strip(strip.to(torch.float32).contiguous(), fmt, out[first * fmt.tile_bytes(shape) :], threads)
    return out


def _encode_strip(weight: torch.Tensor, fmt: PackedFormat, out: torch.Tensor, threads: int | None) -> None:
    if weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():  # ten times faster than isfinite
        raise ValueError(f"weights that are NaN or infinite in float32 cannot be packed as {fmt.name}")
    (n, k), parts = weight.shape, threads or parts_for(weight.numel() * WORK)
    table = encode_kernel.search_table(fmt)
    scratch = torch.empty(parts * encode_kernel.SCRATCH_BYTES, dtype=torch.uint8)
    addresses = (weight.data_ptr(), table.ctypes.data, out.data_ptr(), scratch.data_ptr())
    call(encode_kernel.encode, (*addresses, n, k, PACKED_CODES[fmt.name], len(ANCHORS[fmt.name])), parts)

"""Turn plain weights into packed ones: the way into the formats of quant/packed.py."""

import torch

from quant.encode_reference import quantise
from quant.packed import PackedFormat
from quant.packing import pack


def encode(weight: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """A matrix [N, K] of any float dtype, on the CPU, as uint8 [fmt.nbytes((N, K))].

    ValueError for another rank, and for weights that are NaN, infinite or beyond float32.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"a matrix [N, K] of floats can be packed, not {weight.dtype} of shape {tuple(weight.shape)}")
    values = weight.detach().to(torch.float32).contiguous()
    if not torch.isfinite(values).all():
        raise ValueError(f"weights that are NaN or infinite in float32 cannot be packed as {fmt.name}")
    return torch.from_numpy(pack(quantise(values.numpy(), fmt), fmt))

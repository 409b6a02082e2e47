"""Plain weights into GGUF blocks."""

import torch

from quant.export.block_kernels import BLOCK_KERNELS, SCRATCH_BYTES
from quant.export.block_types import ENCODED, BlockType
from quant.kernels.threads import call, parts_for

WORK = 64  # what a weight costs, in multiplications
LARGEST = 2.0**18  # a weight, so that no sum of squares overflows; scales of half precision end before that anyway


def encode_blocks(values: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """Float32 [..., K], contiguous and on the CPU, as uint8 [bytes]. K: a multiple of kind.block.

    ValueError for values that are NaN, infinite, or beyond 2^18.
    """
    if not values.numel():
        return torch.empty(0, dtype=torch.uint8)
    lowest, highest = torch.aminmax(values)  # NaN if any is
    if not (lowest >= -LARGEST and highest <= LARGEST):
        raise ValueError(f"weights that are no numbers, or beyond {LARGEST:.0f}, cannot be written as {kind.name}")
    if kind not in ENCODED:
        return values.to(torch.float16 if kind.name == "F16" else torch.float32).view(torch.uint8).reshape(-1)
    count, parts = values.numel() // kind.block, parts_for(values.numel() * WORK)
    out = torch.empty(count * kind.block_bytes, dtype=torch.uint8)
    scratch = torch.empty(parts * SCRATCH_BYTES + 64, dtype=torch.uint8)
    call(BLOCK_KERNELS[kind], (values.data_ptr(), out.data_ptr(), scratch.data_ptr(), count), parts)
    return out

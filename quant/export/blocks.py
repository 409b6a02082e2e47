"""Plain weights into GGUF blocks."""

import torch

from quant.export.block_kernels import BLOCK_KERNELS, SCRATCH_BYTES
from quant.export.block_types import BF16, ENCODED, F16, F32, BlockType
from quant.kernels.threads import call, parts_for

WORK = 64  # what a weight costs, in multiplications
PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
LARGEST = 2.0**18  # a weight, so that no sum of squares overflows; scales of half precision end before that anyway


def encode_blocks(values: torch.Tensor, kind: BlockType, threads: int | None = None) -> torch.Tensor:
    """Float32 [..., K], contiguous and on the CPU, as uint8 [bytes]. K: a multiple of kind.block.

    threads: None for as many as pay.
    ValueError for values that are NaN, infinite, or beyond 2^18.
    """
    if not values.numel():
        return torch.empty(0, dtype=torch.uint8)
    lowest, highest = torch.aminmax(values)  # NaN if any is
    if not (lowest >= -LARGEST and highest <= LARGEST):
        raise ValueError(f"weights that are no numbers, or beyond {LARGEST:.0f}, cannot be written as {kind.name}")
    if kind not in ENCODED:
        return values.to(PLAIN[kind]).view(torch.uint8).reshape(-1)
    count, parts = values.numel() // kind.block, threads or parts_for(values.numel() * WORK)
    out = torch.empty(count * kind.block_bytes, dtype=torch.uint8)
    scratch = torch.empty(parts * SCRATCH_BYTES + 64, dtype=torch.uint8)
    call(BLOCK_KERNELS[kind], (values.data_ptr(), out.data_ptr(), scratch.data_ptr(), count), parts)
    return out


def split_blocks(blocks: torch.Tensor, kind: BlockType) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [bytes] of blocks with a scale of two bytes before codes: their codes and their scales, uint8 each."""
    rows = blocks.view(-1, kind.block_bytes)
    return rows[:, 2:].contiguous().view(-1), rows[:, :2].contiguous().view(-1)

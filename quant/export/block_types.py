"""Formats of other programs that we write in blocks: how many values a block holds, and in how many bytes.

Only numbers stand here, no tensors: sizes of files are counted with it. quant/export/block_reference.py says what the
bytes mean.
"""

from dataclasses import dataclass
from math import prod

SUPER_BLOCK = 256  # values of a block of the K formats
BLOCK = 32  # of the others


@dataclass(frozen=True)
class BlockType:
    """One format. block: values that lie together in block_bytes bytes. number: what GGUF calls it, if it has it."""

    name: str
    number: int | None
    block: int
    block_bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row. columns: a multiple of `block`."""
        return columns // self.block * self.block_bytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor whose last axis is that of the columns."""
        return prod(shape[:-1]) * self.row_bytes(shape[-1])


F32 = BlockType("F32", 0, 1, 4)
F16 = BlockType("F16", 1, 1, 2)
BF16 = BlockType("BF16", 30, 1, 2)
Q4_0 = BlockType("Q4_0", 2, BLOCK, 18)
Q5_0 = BlockType("Q5_0", 6, BLOCK, 22)
Q8_0 = BlockType("Q8_0", 8, BLOCK, 34)
Q4_K = BlockType("Q4_K", 12, SUPER_BLOCK, 144)
Q6_K = BlockType("Q6_K", 14, SUPER_BLOCK, 210)
# A group of compressed-tensors with its bfloat16 scale before it; files hold scales and codes apart.
INT4_32 = BlockType("INT4_32", None, 32, 18)
INT4_128 = BlockType("INT4_128", None, 128, 66)
ENCODED = (Q4_0, Q5_0, Q8_0, Q4_K, Q6_K, INT4_32, INT4_128)  # those with an encoder of our own

# What takes the place of a type whose block does not divide a row, as llama.cpp's own quantiser has it.
FALLBACK = {Q4_K: Q5_0, Q6_K: Q8_0}


def fitting(wanted: BlockType, columns: int) -> BlockType:
    """`wanted`, or what takes its place in rows of `columns` values: a type with shorter blocks, in the end F16."""
    if columns % wanted.block == 0:
        return wanted
    shorter = FALLBACK.get(wanted)
    return F16 if shorter is None else fitting(shorter, columns)

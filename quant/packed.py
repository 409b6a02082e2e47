"""The packed formats: what `dsr1 quantize` writes and the CPU kernels read. docs/formats.md has them byte by byte.

Only geometry stands here, no tensors: the planner counts bytes with it before torch is imported. quant/packing.py
turns codes and scales into these bytes and back.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

TILE_ROWS = 16  # weight rows in a tile: the lanes of a vector
BLOCK_K = 128  # columns in a block
LINE = 4 * TILE_ROWS  # bytes: a header, and then the codes, come in lines in which each row owns four
RECORD_ALIGNMENT = 4096  # bytes; an expert can be read from disk, moved to a NUMA node or sliced as whole pages
TENSOR_ALIGNMENT = 64

# What a row's d is multiplied by for each group. "odd4": an odd integer -15..15, stored as c = 0..15 with 2c - 15;
# "i6": an integer -32..31, stored as c = 0..63 with c - 32.
IntegerKind = Literal["odd4", "i6"]
LOWEST_INTEGER: dict[IntegerKind, int] = {"odd4": -15, "i6": -32}  # c = 0
HIGHEST_INTEGER: dict[IntegerKind, int] = {"odd4": 15, "i6": 31}
INTEGER_STEP: dict[IntegerKind, int] = {"odd4": 2, "i6": 1}  # from one c to the next

# Fitted to groups of 16 Gaussian values whose scale may have either sign; tools/formats/fit_levels.py fits them anew.
GAUSS_16 = (-127, -107, -87, -69, -53, -38, -23, -10, 3, 16, 29, 42, 56, 71, 89, 113)


@dataclass(frozen=True)
class PackedFormat:
    """How a matrix [N, K] is stored in blocks of 16 rows by 128 columns.

    A value is d × s × level(code): d is a bfloat16 for each row of a block, s an integer for each of its groups of
    `group` columns (1 without `integers`), and level(code) is `levels[code]`, or code - `zero` without levels.
    """

    name: str
    bits: int
    group: int
    integers: IntegerKind | None
    zero: int
    levels: tuple[int, ...] | None = None

    @property
    def header_bytes(self) -> int:
        """Bytes of d and the integers, at the start of a block."""
        return 2 * LINE if self.integers == "i6" else LINE

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: the header and the codes."""
        return self.header_bytes + TILE_ROWS * BLOCK_K * self.bits // 8

    @property
    def bits_per_weight(self) -> float:
        """Scales included; padding of ragged shapes is not."""
        return 8 * self.block_bytes / (TILE_ROWS * BLOCK_K)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed matrix of `shape` [N, K], padding included."""
        return tiles(shape) * self.tile_bytes(shape)

    def tile_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of one tile of 16 rows: its blocks lie one after the other."""
        return blocks_per_row(shape) * self.block_bytes

    def descriptor(self) -> dict[str, Any]:
        """The format as a store's manifest describes it. A reader refuses a descriptor that it does not know whole."""
        return {
            "name": self.name,
            "bits": self.bits,
            "group": self.group,
            "scale": "bf16",
            "integers": self.integers,
            "zero": self.zero,
            "levels": None if self.levels is None else list(self.levels),
            "tile_rows": TILE_ROWS,
            "block_k": BLOCK_K,
            "header_bytes": self.header_bytes,
        }


FAST = PackedFormat("fast", 4, 32, "odd4", zero=8)
ACCURATE = PackedFormat("accurate", 4, 16, "i6", zero=0, levels=GAUSS_16)
Q8 = PackedFormat("q8", 8, BLOCK_K, None, zero=128)
PACKED_FORMATS = {fmt.name: fmt for fmt in (FAST, ACCURATE, Q8)}
# By the bytes of a block: those in which the CPU reads wkv_b as it is stored.
HEAD_FORMATS = {fmt.block_bytes: fmt for fmt in (FAST, Q8)}


def reads_heads(name: str, nope: int, value: int, lora: int) -> bool:
    """Whether a wkv_b in the format `name` can be read as it is stored: no block is ragged or of two heads' rows."""
    whole = nope % TILE_ROWS == value % TILE_ROWS == lora % BLOCK_K == 0
    return whole and name in (fmt.name for fmt in HEAD_FORMATS.values())


def tiles(shape: tuple[int, ...]) -> int:
    """Tiles of 16 rows; the last one of a ragged matrix is filled up with rows of zeros."""
    return ceil(shape[0] / TILE_ROWS)


def blocks_per_row(shape: tuple[int, ...]) -> int:
    """Blocks of 128 columns; the last one of a ragged matrix is filled up with zeros."""
    return ceil(shape[1] / BLOCK_K)


def experts_format(gate_up: PackedFormat, down: PackedFormat) -> str:
    """The name of a pair of formats: a plan writes what a component has in several formats as "a+b"."""
    return gate_up.name if gate_up == down else f"{gate_up.name}+{down.name}"


# The pairs of formats, of gate and up and of down, that a routed expert may have, by their names.
EXPERT_FORMATS = {
    experts_format(gate_up, down): (gate_up, down)
    for gate_up in PACKED_FORMATS.values()
    for down in PACKED_FORMATS.values()
}


@dataclass(frozen=True)
class ExpertRecord:
    """Where the matrices of a routed expert lie in its record: gate (w1), up (w3), down (w2), one after the other.

    w1 and w3: [inter, dim]; w2: [dim, inter]. format: of w1 and w3, and of w2 unless `w2_format` is given.
    """

    format: PackedFormat
    dim: int
    inter_dim: int
    w2_format: PackedFormat | None = None

    @property
    def down_format(self) -> PackedFormat:
        """The format of w2."""
        return self.w2_format or self.format

    @property
    def format_name(self) -> str:
        """What the formats are called together: "accurate", or "accurate+q8" where w2 is q8."""
        return experts_format(self.format, self.down_format)

    @property
    def w1(self) -> int:
        return 0

    @property
    def w3(self) -> int:
        return self.format.nbytes((self.inter_dim, self.dim))

    @property
    def w2(self) -> int:
        return 2 * self.w3

    @property
    def nbytes(self) -> int:
        """Bytes of a record, filled up with zeros to whole pages of 4 KiB."""
        used = self.w2 + self.down_format.nbytes((self.dim, self.inter_dim))
        return ceil(used / RECORD_ALIGNMENT) * RECORD_ALIGNMENT


def expert_record(name: str, dim: int, inter_dim: int) -> ExpertRecord:
    """The record of experts in one of EXPERT_FORMATS."""
    gate_up, down = EXPERT_FORMATS[name]
    return ExpertRecord(gate_up, dim, inter_dim, down)

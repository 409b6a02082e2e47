"""How the GPU kernels divide their work: block sizes, warps, stages and splits, as fixed functions of shapes.

Nothing here depends on a measurement or on the chip, so the same call gives the same bits on every GPU of a kind. Each
choice compiles for sm_80 to sm_120 without spills and in 99 KiB of shared memory (tests/test_triton_build.py).
"""

from dataclasses import dataclass

from quant.packed import TILE_ROWS

PACKED_CODES = {"fast": 0, "accurate": 1, "q8": 2}  # numbers of weight_tiles.py
FP8_CODE, FP8_NATIVE_CODE, BF16_CODE = 3, 4, 5
NATIVE_FP8_FROM = (8, 9)  # compute capability whose instructions know E4M3

PROGRAMS = 256  # that a launch should have at least; the largest chips have 132 to 170 processors
BLOCK_K = 128  # columns of a block of weights
FEW_TOKENS = 16  # up to so many, a program takes all tokens
KEY_BLOCK = 1024  # cached tokens that prefill decompresses at a time


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel. m, n: sizes of a program's tile. stages: of its pipeline of loads."""

    m: int
    n: int
    warps: int
    stages: int


LINEAR_FEW = Config(16, 32, 4, 4)
LINEAR_FEW_Q8 = Config(16, 64, 8, 3)
LINEAR_MANY = Config(64, 64, 4, 2)
EXPERTS_FEW = Config(16, 32, 4, 3)
HIDDEN_MANY = Config(32, 64, 8, 2)
HIDDEN_MANY_Q8 = DOWN_MANY = Config(32, 64, 4, 2)
ABSORB = Config(16, 128, 4, 1)
PROJECT = Config(16, 128, 8, 2)
DECODE_BF16 = Config(32, 32, 8, 2)  # heads, cached tokens
DECODE_BF16_FEW_HEADS = Config(16, 32, 4, 2)
DECODE_BYTES = Config(16, 32, 8, 2)
PREFILL = Config(128, 32, 8, 2)  # queries, keys


def reads_heads(nope: int, value: int, rope: int, lora: int) -> bool:
    """Whether attention's kernels take these widths of a head: powers of 2 from 16 on, as in all published models."""
    return all(size >= TILE_ROWS and size & (size - 1) == 0 for size in (nope, value, rope, lora))


def linear_config(tokens: int, name: str) -> Config:
    """For x [tokens, K] and weights of the format `name`."""
    if tokens > FEW_TOKENS:
        return LINEAR_MANY
    return LINEAR_FEW_Q8 if name == "q8" else LINEAR_FEW


def linear_splits(tokens: int, rows: int, columns: int, name: str) -> int:
    """Programs that share the columns of a tile of output, so that decoding keeps every processor busy."""
    config = linear_config(tokens, name)
    tiles = -(-rows // config.n) * -(-tokens // config.m)
    blocks = -(-columns // BLOCK_K)
    wanted = min(blocks, -(-PROGRAMS // tiles))
    each = -(-blocks // wanted)
    return -(-blocks // each)


def expert_configs(pairs: int, experts: int, name: str) -> tuple[Config, Config]:
    """For w1 and w3, and for w2, of pairs of token and expert on `experts` experts; of one m."""
    if pairs <= FEW_TOKENS * experts:
        return EXPERTS_FEW, EXPERTS_FEW
    return HIDDEN_MANY_Q8 if name == "q8" else HIDDEN_MANY, DOWN_MANY


def expert_blocks(pairs: int, experts: int, m: int) -> int:
    """Blocks of up to m pairs of one expert each: the most that there can be."""
    return min(experts, pairs) + pairs // m


def decode_config(heads: int, in_bytes: bool) -> Config:
    """For attention to a cache of bfloat16 or of bytes."""
    if in_bytes:
        return DECODE_BYTES
    return DECODE_BF16 if heads > DECODE_BF16_FEW_HEADS.m else DECODE_BF16_FEW_HEADS


def decode_splits(tokens: int, heads: int, in_bytes: bool) -> int:
    """Parts of the context that different programs attend to, whatever its length is."""
    programs = tokens * -(-heads // decode_config(heads, in_bytes).m)
    return max(1, PROGRAMS // programs)

"""Prints what each GPU kernel moves and computes for R1, beside the limits of an RTX 4090. Nothing is measured.

    python -m tools.gpu.roofline

limit: the time that the operation's own bytes and arithmetic take at the least. share: the limit by the time that what
the kernel moves and computes takes, padding of tiles, workspaces and repeated reads from the second-level cache (which
count a fifth) included: so much of the roofline is left before instructions and latencies have their say.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quant.gpu import shapes
from quant.packed import PACKED_FORMATS, ExpertRecord
from tools.gpu.build import Built, build
from tools.gpu.variants import LORA, NOPE, ROPE, VALUE, variants

BANDWIDTH, PEAK = 1008e9, 165.2e12  # bytes of GDDR6X and dense bfloat16 operations with float32 sums, a second
L2_SHARE = 1 / 5  # of the time that a byte from memory takes
HEADS, DIM, INTER = 128, 7168, 2048


@dataclass(frozen=True)
class Row:
    """One use of a kernel. needed, moved: bytes; operations, done: of arithmetic, without and with padding."""

    what: str
    variant: str
    needed: float
    moved: float
    operations: float
    done: float

    @property
    def limit(self) -> float:
        return max(self.needed / BANDWIDTH, self.operations / PEAK)

    @property
    def share(self) -> float:
        return self.limit / max(self.moved / BANDWIDTH, self.done / PEAK)


def linear(name: str, tokens: int, rows: int, columns: int) -> Row:
    """A matrix of R1 times `tokens` tokens."""
    config, splits = shapes.linear_config(tokens, name), shapes.linear_splits(tokens, rows, columns, name)
    bits = PACKED_FORMATS[name].bits_per_weight if name in PACKED_FORMATS else 8
    weights, inputs = rows * columns * bits / 8, 2 * tokens * (rows + columns)
    blocks = -(-tokens // config.m)
    again = (weights * (blocks - 1) + 2 * tokens * columns * (rows / config.n - 1)) * L2_SHARE
    partial = 8 * splits * tokens * rows * L2_SHARE if splits > 1 else 0
    operations = 2 * tokens * rows * columns
    what = "1-16 tokens" if tokens <= shapes.FEW_TOKENS else "prefill"
    needed = weights + inputs
    title = f"[{rows}, {columns}] {name}, {tokens} tokens"
    done = 2 * blocks * config.m * rows * columns
    return Row(title, f"linear, {name}, {what}", needed, needed + again + partial, operations, done)


def decode(context: int, in_bytes: bool) -> Row:
    """Attention of one token to a layer's cache."""
    config, splits = shapes.decode_config(HEADS, in_bytes), shapes.decode_splits(1, HEADS, in_bytes)
    cache = context * (656 if in_bytes else 2 * (LORA + ROPE))
    partial = 2 * 4 * splits * HEADS * LORA
    operations = 2 * HEADS * context * (2 * LORA + ROPE)
    moved = cache + (cache * (HEADS / config.m - 1) + partial) * L2_SHARE
    kind = "8-bit cache" if in_bytes else "bf16 cache"
    return Row(
        f"decode, {context} tokens, {kind}", f"attention, {kind}, 128 heads", cache, moved, operations, operations
    )


def prefill(tokens: int, context: int) -> Row:
    """Attention of a chunk; keys and values are written and read once a block, the sums are carried."""
    keys = context * HEADS * (NOPE + VALUE) * 2
    carried = 2 * 4 * tokens * HEADS * VALUE * (context / shapes.KEY_BLOCK)
    cache = context * 2 * (LORA + ROPE)
    again = keys * (tokens / shapes.PREFILL.m) * L2_SHARE
    operations = 2 * HEADS * tokens * context * (NOPE + ROPE + VALUE) + 2 * context * HEADS * (NOPE + VALUE) * LORA
    moved = cache + 2 * keys + again + carried
    return Row(
        f"prefill, {tokens} tokens at {context}", "prefill attention, bf16 cache", cache, moved, operations, operations
    )


def experts(name: str, pairs_each: int, count: int, half: str) -> Row:
    """`count` experts on the GPU with `pairs_each` tokens each."""
    record = ExpertRecord(PACKED_FORMATS[name], DIM, INTER)
    weights = record.w2 if half == "gate and up" else record.nbytes - record.w2
    pairs = pairs_each * count
    hidden, down = shapes.expert_configs(pairs, count, name)
    config = hidden if half == "gate and up" else down
    what = "few tokens" if config is shapes.EXPERTS_FEW else "prefill"
    share = 2 if half == "gate and up" else 1
    blocks = -(-pairs_each // config.m)
    operations = 2 * pairs * DIM * INTER * share
    done = 2 * blocks * config.m * count * DIM * INTER * share
    needed = weights * count + pairs * (2 * DIM + 2 * INTER)
    moved = needed + weights * count * (blocks - 1) * L2_SHARE + (0 if share == 2 else 4 * pairs * DIM)
    title = f"{count} experts, {half}, {name}, {pairs_each} tokens each"
    return Row(title, f"experts, {half}, {name}, {what}", needed, moved, operations, done)


def rows() -> Iterator[Row]:
    """Those of the table."""
    for name in ("q8", "accurate", "fast", "fp8_block"):
        yield linear(name, 1, 7168, 16384)
        yield linear(name, 512, 7168, 16384)
    yield linear("q8", 16, 1536, 7168)
    for in_bytes in (False, True):
        yield decode(32768, in_bytes)
        yield decode(131072, in_bytes)
    yield prefill(512, 32768)
    for half in ("gate and up", "down"):
        yield experts("accurate", 1, 8, half)
        yield experts("accurate", 64, 16, half)


def main() -> None:
    by_name = {variant.name: variant for variant in variants()}
    print("| operation | bytes needed, moved | Gop | registers | shared | limit | share |")
    print("|---|---|---|---|---|---|---|")
    for row in rows():
        built: Built = build(by_name[row.variant], 89)
        size = f"{row.needed / 1e6:,.1f}, {row.moved / 1e6:,.1f} MB"
        cells = row.what, size, f"{row.operations / 1e9:,.2f}", built.registers, f"{built.shared / 1024:.0f} KiB"
        print("|", " | ".join(map(str, cells)), f"| {row.limit * 1e6:,.0f} µs | {row.share:.0%} |")


if __name__ == "__main__":
    main()

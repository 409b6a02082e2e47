"""Every way in which the GPU kernels are compiled for R1's shape: the launches of quant/gpu/launch.py as data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quant.gpu import shapes
from quant.gpu.attention_kernels import absorb_kernel, decode_kernel, join_splits_kernel, prefill_kernel, project_kernel
from quant.gpu.expert_kernels import combine_kernel, down_kernel, hidden_kernel
from quant.gpu.launch import SUM_BLOCK
from quant.gpu.linear_kernels import linear_kernel, sum_splits_kernel
from quant.gpu.shapes import Config

LORA, NOPE, ROPE, VALUE = 512, 128, 64, 128
HEADS_FORM = {"NOPE": NOPE, "VALUE": VALUE, "LORA": LORA}

# Types of arguments by name; what is not here is an i32.
POINTERS = {
    **dict.fromkeys(("x", "out", "q", "q_latent", "q_pe", "q_nope", "kv", "ropes", "latents", "hidden"), "*bf16"),
    **dict.fromkeys(("scale", "scales", "partial", "stats", "sums", "outputs", "weights_of_pairs"), "*fp32"),
    **dict.fromkeys(("records", "seen", "block_experts", "slots", "experts"), "*i32"),
}
# Numbers that are multiples of 16 in all published models, which a launch tells the compiler, too.
EVEN = {
    "rows",
    "columns",
    "heads",
    "q_token",
    "q_head",
    "dim",
    "inter",
    "record_words",
    "w3_words",
    "w2_words",
    "pairs",
}


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled. types: of arguments other than by POINTERS. wants: what its code must have."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    config: Config
    newest_only: bool = False  # for chips from sm_89 on
    wants: tuple[str, ...] = ()

    def signature(self) -> dict[str, str]:
        """The type of each argument."""
        known = {**POINTERS, **self.types, **dict.fromkeys(self.constants, "constexpr")}
        return {name: known.get(name, "i32") for name in self.kernel.arg_names}

    def even(self) -> list[str]:
        """Arguments that are multiples of 16: addresses, and sizes of models."""
        return [name for name, kind in self.signature().items() if kind.startswith("*") or name in EVEN]


WEIGHTS = {"fast": 0, "accurate": 1, "q8": 2, "fp8_block": 3, "fp8_block, native": 4, "bf16": 5}
STORED = {3: "*u8", 4: "*u8", 5: "*bf16"}
DOT, WIDE = "tensor cores", "16 bytes a copy"


def _of_weights() -> Iterator[tuple[str, dict[str, Any], dict[str, str], bool, tuple[str, ...]]]:
    for name, code in WEIGHTS.items():
        yield name, {"FORMAT": code}, {"data": STORED.get(code, "*i32")}, name.endswith("native"), (DOT, WIDE)


def variants() -> Iterator[Variant]:
    """All of them."""
    for name, form, types, newest, wants in _of_weights():
        for what, tokens in (("1-16 tokens", 1), ("prefill", 1000)):
            config = shapes.linear_config(tokens, name)
            tile = {**form, "BLOCK_M": config.m, "BLOCK_N": config.n}
            out = {"out": "*fp32" if tokens == 1 else "*bf16"}
            yield Variant(f"linear, {name}, {what}", linear_kernel, tile, types | out, config, newest, wants)
        for kernel, config in ((absorb_kernel, shapes.ABSORB), (project_kernel, shapes.PROJECT)):
            heads = {**form, **HEADS_FORM, "BLOCK_T": config.m}
            title = f"{kernel.__name__.removesuffix('_kernel')}, {name}"
            yield Variant(title, kernel, heads, types, config, newest, (DOT,))
    yield from _attention()
    yield from _experts()
    sums = {"BLOCK": SUM_BLOCK}
    plain = Config(0, 0, 4, 3)
    yield Variant("sum of splits", sum_splits_kernel, sums, {"count": "i32"}, plain)
    yield Variant("join of splits", join_splits_kernel, {"LORA": LORA}, {}, plain)
    yield Variant("sum of experts", combine_kernel, sums, {"out": "*fp32"}, plain)


def _attention() -> Iterator[Variant]:
    for in_bytes in (False, True):
        kind = "8-bit cache" if in_bytes else "bf16 cache"
        rows = {"cache": "*i8" if in_bytes else "*bf16", "scale": "fp32"}
        form = {"LORA": LORA, "ROPE": ROPE, "BYTES": in_bytes}
        for heads in (16, 128):
            config = shapes.decode_config(heads, in_bytes)
            tile = {**form, "BLOCK_H": config.m, "BLOCK_S": config.n}
            yield Variant(f"attention, {kind}, {heads} heads", decode_kernel, tile, rows, config, False, (DOT, WIDE))
        config, numbers = shapes.PREFILL, {"scale": "fp32", "seen": "i32"}
        tile = {**form, "NOPE": NOPE, "VALUE": VALUE, "BLOCK_T": config.m, "BLOCK_S": config.n}
        yield Variant(f"prefill attention, {kind}", prefill_kernel, tile, numbers, config, False, (DOT, WIDE))


def _experts() -> Iterator[Variant]:
    for name, code in shapes.PACKED_CODES.items():
        for what, pairs in (("few tokens", 1), ("prefill", 1000)):
            configs = shapes.expert_configs(pairs, 16, name)
            for kernel, half, config in zip(
                (hidden_kernel, down_kernel), ("gate and up", "down"), configs, strict=True
            ):
                tile = {"FORMAT": code, "BLOCK_M": config.m, "BLOCK_N": config.n}
                yield Variant(f"experts, {half}, {name}, {what}", kernel, tile, {}, config, False, (DOT, WIDE))

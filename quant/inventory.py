"""The tensors of a model, described once: what the reader, the loader, the converter and the planner share.

Everything here follows from config.json; no file is touched. Shape letters: D dim, V vocab, E routed experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, prod
from typing import Literal, NamedTuple

from quant.config import ModelConfig
from quant.errors import ConfigError
from quant.names import NAMES, fill

Component = Literal["embed", "attention", "dense", "router", "routed_expert", "shared_expert", "norm", "head", "mtp"]
Shape = tuple[int, ...]

FP8_MODEL_LINEAR = ("fp8_block", "bf16")
PLAIN = ("bf16", "f32")
MAX_EXPERTS = 2**18  # over all layers; ten times the largest model's, so a damaged config.json cannot fill memory
MAX_LAYERS = 2**12


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model.

    name: ours, as in quant/names.py. source: the published checkpoint's. layer: None outside of the layers;
    n_layers and up are MTP layers. expert: None but for routed experts. representations: names of the formats
    (quant/formats.py) in which a checkpoint may hold it.
    """

    name: str
    source: str
    component: Component
    layer: int | None
    expert: int | None
    shape: Shape
    representations: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, eq=False)
class Inventory:
    """All tensors of one model, in the order in which a token meets them."""

    config: ModelConfig
    tensors: tuple[TensorSpec, ...]

    @staticmethod
    def of(config: ModelConfig) -> "Inventory":
        """The tensors of the model of `config`, MTP layers included. Raises ConfigError for absurd counts."""
        return _inventory(config)

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.tensors}

    @cached_property
    def by_source(self) -> dict[str, TensorSpec]:
        return {spec.source: spec for spec in self.tensors}

    @cached_property
    def by_layer(self) -> dict[int | None, tuple[TensorSpec, ...]]:
        """Tensors of each layer; those outside of the layers under None."""
        groups: dict[int | None, list[TensorSpec]] = {}
        for spec in self.tensors:
            groups.setdefault(spec.layer, []).append(spec)
        return {layer: tuple(specs) for layer, specs in groups.items()}

    @cached_property
    def by_component(self) -> dict[Component, tuple[TensorSpec, ...]]:
        """Tensors of each component, MTP layers included: an expert of an MTP layer is a `routed_expert`."""
        groups: dict[Component, list[TensorSpec]] = {}
        for spec in self.tensors:
            groups.setdefault(spec.component, []).append(spec)
        return {component: tuple(specs) for component, specs in groups.items()}

    @property
    def mtp_layers(self) -> range:
        return range(self.config.n_layers, self.config.n_layers + self.config.n_mtp_layers)

    def parameters(self, component: Component) -> int:
        """Values in the tensors of `component` in the model proper, MTP layers left out."""
        specs = self.by_component.get(component, ())
        return sum(spec.parameters for spec in specs if spec.layer not in self.mtp_layers)

    def layer_parameters(self, layer: int) -> int:
        """Values in all tensors of one layer; an MTP layer counts its own copies of embedding and head."""
        return sum(spec.parameters for spec in self.by_layer[layer])


CacheFormat = Literal["bfloat16", "float32", "int8"]
INT8_GROUP = 128  # latents that share a scale


def cache_row_bytes(config: ModelConfig, fmt: CacheFormat) -> int:
    """Bytes of one token in one layer of the latent cache: its latent and its rope key.

    "int8": latents of 8 bits with a float32 scale for each 128 of them, and the rope key in bfloat16; 656 bytes in R1.
    """
    if fmt != "int8":
        return config.latent_dim * (2 if fmt == "bfloat16" else 4)
    return config.kv_lora_rank + 4 * ceil(config.kv_lora_rank / INT8_GROUP) + 2 * config.qk_rope_head_dim


def cache_bytes(config: ModelConfig, tokens: int, fmt: CacheFormat) -> int:
    """Bytes of the latent cache. MTP layers are left out."""
    return tokens * config.n_layers * cache_row_bytes(config, fmt)


class _Row(NamedTuple):
    """A tensor of a layer, by its pattern in the table of names; `#` of the layer (and expert) is not filled yet."""

    pattern: str
    component: Component
    shape: Shape
    representations: tuple[str, ...] = PLAIN


@lru_cache(maxsize=8)
def _inventory(config: ModelConfig) -> Inventory:
    _check_counts(config)
    top = (config.vocab_size, config.dim)
    specs = [_spec(_Row("embed", "embed", top))]
    for layer in range(config.n_layers + config.n_mtp_layers):
        specs += _layer_specs(config, layer)
    specs += [_spec(_Row("norm", "norm", (config.dim,))), _spec(_Row("head", "head", top))]
    return Inventory(config, tuple(specs))


def _check_counts(config: ModelConfig) -> None:
    layers = config.n_layers + config.n_mtp_layers
    if layers > MAX_LAYERS or layers * config.n_routed_experts > MAX_EXPERTS:
        raise ConfigError(
            f"num_hidden_layers and num_nextn_predict_layers ({layers} together) with n_routed_experts="
            f"{config.n_routed_experts} are beyond any model; download config.json again"
        )


def _layer_specs(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    for row in _before_experts(config, layer):
        yield _spec(row, layer)
    if config.is_moe(layer):
        yield from _expert_specs(config, layer)


def _before_experts(config: ModelConfig, layer: int) -> Iterator[_Row]:
    if layer >= config.n_layers:
        yield from _mtp_rows(config)
    yield _Row("layers.#.attn_norm", "norm", (config.dim,))
    yield from _attention_rows(config)
    yield _Row("layers.#.ffn_norm", "norm", (config.dim,))
    if not config.is_moe(layer):
        yield from _mlp_rows(config, "layers.#.ffn", "dense", config.inter_dim)
        return
    yield _Row("layers.#.ffn.gate.weight", "router", (config.n_routed_experts, config.dim))
    yield _Row("layers.#.ffn.gate.bias", "router", (config.n_routed_experts,))
    shared = config.n_shared_experts * config.moe_inter_dim
    yield from _mlp_rows(config, "layers.#.ffn.shared_experts", "shared_expert", shared)


def _attention_rows(config: ModelConfig) -> Iterator[_Row]:
    """MLA: DeepSeek-V3 paper, section 2.1.1."""
    linear = FP8_MODEL_LINEAR if config.fp8 else PLAIN
    queries = config.n_heads * config.qk_head_dim
    kv = config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
    rank = config.q_lora_rank
    if rank:
        yield _Row("layers.#.attn.wq_a", "attention", (rank, config.dim), linear)
        yield _Row("layers.#.attn.q_norm", "norm", (rank,))
        yield _Row("layers.#.attn.wq_b", "attention", (queries, rank), linear)
    else:
        yield _Row("layers.#.attn.wq", "attention", (queries, config.dim), linear)
    yield _Row("layers.#.attn.wkv_a", "attention", (config.latent_dim, config.dim), linear)
    yield _Row("layers.#.attn.kv_norm", "norm", (config.kv_lora_rank,))
    yield _Row("layers.#.attn.wkv_b", "attention", (kv, config.kv_lora_rank), linear)
    yield _Row("layers.#.attn.wo", "attention", (config.dim, config.n_heads * config.v_head_dim), linear)


def _mlp_rows(config: ModelConfig, prefix: str, component: Component, inter: int) -> Iterator[_Row]:
    """w1 is the gate, w3 the up and w2 the down projection."""
    linear = FP8_MODEL_LINEAR if config.fp8 else PLAIN
    yield _Row(f"{prefix}.w1", component, (inter, config.dim), linear)
    yield _Row(f"{prefix}.w3", component, (inter, config.dim), linear)
    yield _Row(f"{prefix}.w2", component, (config.dim, inter), linear)


def _expert_specs(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    rows = tuple(_mlp_rows(config, "layers.#.ffn.experts.#", "routed_expert", config.moe_inter_dim))
    for expert in range(config.n_routed_experts):
        for row in rows:
            yield _spec(row, layer, expert)


def _mtp_rows(config: ModelConfig) -> Iterator[_Row]:
    """Multi-token prediction: DeepSeek-V3 paper, section 2.2; embedding and head repeat those of the model."""
    top = (config.vocab_size, config.dim)
    yield _Row("layers.#.embed", "mtp", top)
    yield _Row("layers.#.enorm", "mtp", (config.dim,))
    yield _Row("layers.#.hnorm", "mtp", (config.dim,))
    yield _Row("layers.#.eh_proj", "mtp", (config.dim, 2 * config.dim))
    yield _Row("layers.#.shared_head.norm", "mtp", (config.dim,))
    yield _Row("layers.#.shared_head.head", "mtp", top)


def _spec(row: _Row, layer: int | None = None, expert: int | None = None) -> TensorSpec:
    numbers = [number for number in (layer, expert) if number is not None]
    name, source = fill(row.pattern, *numbers), fill(NAMES[row.pattern], *numbers)
    return TensorSpec(name, source, row.component, layer, expert, row.shape, row.representations)

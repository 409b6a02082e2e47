"""The model under training: the runtime's own modules, with parameters in place of a checkpoint's tensors.

Shapes: B sequences of L tokens, T = B * L of them in one row, K experts a token, E experts in all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hybrid_rt.rope import softmax_scale
from hybrid_rt.transformer import Transformer
from quant.config import ModelConfig, parse_config
from quant.inventory import Inventory

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 32,
    "vocab_size": 512,
}

EMBED_STD = 0.2
FEWEST = 0.3  # share of a step's tokens; see masked_loss
STARTS_AT_ZERO = ("wo", "w2", "head")  # so that every block begins as the identity, and all tokens as equals


# Operators of our own, for torch.compile takes torch._grouped_mm in bfloat16 only.
@torch.library.custom_op("nano_r1::grouped_mm", mutates_args=())
def grouped_mm(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows [R, columns] times the transposed weight [E, out, columns] of their expert; rows are sorted by expert.

    ends: int64 [E], where each expert's rows end.
    """
    out = rows.new_empty(len(rows), weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(rows[start:end], weight[expert].T, out=out[start:end])
        start = end
    return out


@torch.library.custom_op("nano_r1::grouped_outer", mutates_args=())
def grouped_outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The transposed left [R, a] times right [R, b] of each expert's rows: [E, a, b]."""
    out = left.new_empty(len(ends), left.shape[1], right.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(left[start:end].T, right[start:end], out=out[expert])
        start = end
    return out


@grouped_mm.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(len(rows), weight.shape[1])


@grouped_outer.register_fake
def _(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return left.new_empty(len(ends), left.shape[1], right.shape[1])


def _keep_for_backward(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    rows, weight, ends = ctx.saved_tensors
    return grouped_mm(grad, weight.transpose(1, 2), ends), grouped_outer(grad, rows, ends), None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_keep_for_backward)


class _Dispatch(torch.autograd.Function):
    """x [T, dim] in the experts' order [T * K, dim]. Its own backward: a gather, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """The transpose of _Dispatch: the sum of each token's K rows, [T, dim]."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return y[inverse].unflatten(0, (-1, top_k)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order // ctx.top_k], None, None, None


class TrainExperts(nn.Module):
    """All experts of one layer as stacked weights; no token is dropped. `chosen` keeps who went where last."""

    def __init__(self, w1: nn.Parameter, w2: nn.Parameter, w3: nn.Parameter) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = w1, w2, w3  # [E, inter, dim], [E, dim, inter], [E, inter, dim]
        self.chosen = torch.zeros(0, w1.shape[0], dtype=torch.int64)  # [T, K]

    def submit(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The same sum that `sync` hands out: nothing runs beside it when training."""
        self.chosen = ids
        top_k, flat = ids.shape[1], ids.flatten()
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        ends = (flat[:, None] <= torch.arange(len(self.w1))).sum(0)
        rows = _Dispatch.apply(x, order, inverse, top_k)
        gate, up = grouped_mm(rows, torch.cat([self.w1, self.w3], dim=1), ends).split(self.w1.shape[1], dim=-1)
        # Weighted here, where rows are narrow, and not after w2.
        hidden = F.silu(gate) * up * weights.flatten()[order, None]
        return _Combine.apply(grouped_mm(hidden, self.w2, ends), order, inverse, top_k)

    def sync(self, pending: torch.Tensor) -> torch.Tensor:
        return pending


class TrainParts:
    """Fresh parameters under the inventory's names: `parameters` holds them all, the experts' stacked.

    The MTP module shares embedding and head with the model, as in the DeepSeek-V3 report (section 2.2).
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config, self.specs = config, Inventory.of(config).by_name
        self.rng = torch.Generator().manual_seed(seed)
        self.parameters: dict[str, nn.Parameter] = {}
        self.biases: dict[str, torch.Tensor] = {}
        self.expert_layers: dict[int, TrainExperts] = {}

    def linear(self, name: str) -> nn.Module:
        rows, columns = self.specs[name].shape
        module = nn.Linear(columns, rows, bias=False, device="meta")
        name = "head" if name.endswith(".head") else name
        module.weight = self._matrix(name, (rows, columns))
        return module

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = self.specs[name].shape
        if name.endswith("gate.bias"):
            return self.biases.setdefault(name, torch.zeros(shape))
        return self._keep(name, torch.ones(shape)) if len(shape) == 1 else self._matrix(name, shape)

    def whole(self, name: str) -> Callable[[], torch.Tensor]:
        matrix = self.tensor(name)
        return lambda: matrix

    def embedding(self, name: str) -> torch.Tensor:
        return self._keep("embed", torch.randn(self.specs[name].shape, generator=self.rng) * EMBED_STD)

    def experts(self, layer: int) -> TrainExperts:
        n, inter, dim = self.config.n_routed_experts, self.config.moe_inter_dim, self.config.dim
        shapes = {"w1": (n, inter, dim), "w2": (n, dim, inter), "w3": (n, inter, dim)}
        stacks = {w: self._matrix(f"layers.{layer}.ffn.experts.{w}", shape) for w, shape in shapes.items()}
        self.expert_layers[layer] = TrainExperts(**stacks)
        return self.expert_layers[layer]

    def _matrix(self, name: str, shape: tuple[int, ...]) -> nn.Parameter:
        gain = 0.0 if name.rpartition(".")[2] in STARTS_AT_ZERO else shape[-1] ** -0.5
        return self._keep(name, torch.randn(shape, generator=self.rng) * gain)

    def _keep(self, name: str, value: torch.Tensor) -> nn.Parameter:
        """The parameter `name`; a second request for a shared one finds the first."""
        return self.parameters.setdefault(name, nn.Parameter(value))


@torch.library.custom_op("nano_r1::causal_attention", mutates_args=())
def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention inside each of B rows of L tokens of q, k, v [T, H, D]; also the log-sum-exps [H * T].

    shape: int64 [2], B and L. As a tensor it stays out of the compiled graph, so that one graph serves all buckets.
    Tokens past B * L are filling; their output is 0.
    """
    n_rows, length = shape.tolist()
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_rows(t, n_rows, length) for t in (q, k, v)), is_causal=True, scale=scale
    )
    return _flat(out, len(q)), F.pad(sums.flatten(), (0, q.shape[0] * q.shape[1] - sums.numel()))


@torch.library.custom_op("nano_r1::causal_attention_grad", mutates_args=())
def causal_attention_grad(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    shape: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    n_rows, length = shape.tolist()
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_rows(t, n_rows, length) for t in (grad, q, k, v, out)),
        sums[: n_rows * length * q.shape[1]].view(n_rows, q.shape[1], length),
        0.0,
        True,
        scale=scale,
    )
    return _flat(grads[0], len(q)), _flat(grads[1], len(q)), _flat(grads[2], len(q))


def _rows(flat: torch.Tensor, n_rows: int, length: int) -> torch.Tensor:
    """[T, H, D] as [B, H, L, D]."""
    return flat[: n_rows * length].unflatten(0, (n_rows, length)).transpose(1, 2)


def _flat(rows: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """[B, H, L, D] as contiguous [T, H, D], filled up with zeros."""
    flat = rows.transpose(1, 2).flatten(0, 1)
    return F.pad(flat, (0, 0, 0, 0, 0, n_tokens - len(flat))).contiguous()


@causal_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: torch.Tensor, scale: float) -> Any:
    return torch.empty_like(q), q.new_empty(q.shape[0] * q.shape[1])


@causal_attention_grad.register_fake
def _(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _attention_backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    q, k, v, shape, out, sums = ctx.saved_tensors
    return *causal_attention_grad(grad, q, k, v, out, sums, shape, ctx.scale), None, None


causal_attention.register_autograd(_attention_backward, setup_context=_keep_attention)


class PackedContext:
    """Sequences of one length laid end to end, each seeing itself only. Padding stands at the end of a row."""

    def __init__(self, config: ModelConfig, positions: torch.Tensor, shape: torch.Tensor) -> None:
        self.positions, self.shape, self.scale = positions, shape, softmax_scale(config)

    def attend(
        self,
        layer: int,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        latent: torch.Tensor,
        wkv_b: torch.Tensor,
    ) -> torch.Tensor:
        n_heads, nope = q_nope.shape[1:]
        kv, k_pe = latent.split([wkv_b.shape[-1], q_pe.shape[-1]], dim=-1)
        k_nope, v = (
            F.linear(kv, wkv_b.flatten(0, 1)).unflatten(-1, (n_heads, -1)).split([nope, wkv_b.shape[1] - nope], -1)
        )
        q = torch.cat([q_nope, q_pe], dim=-1)
        k = torch.cat([k_nope, k_pe[:, None].expand(-1, n_heads, -1)], dim=-1)
        wide = F.pad(v, (0, k.shape[-1] - v.shape[-1]))  # the kernel wants values as wide as keys
        return causal_attention(q, k, wide, self.shape, self.scale)[0][..., : v.shape[-1]]


@dataclass(frozen=True)
class Rows:
    """Tokens laid end to end, and what the model is to say after each: all [T] but `shape`, int64 (B, L).

    `weight` is 1.0 where the target counts; `*_next` are those of the token after the target, for the MTP module.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    shape: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    target_next: torch.Tensor
    weight_next: torch.Tensor
    real: torch.Tensor  # 1.0 but for padding and filling
    half: torch.Tensor  # int64 [T / 2]: the tokens of the first B // 2 rows, which train the MTP module
    half_shape: torch.Tensor


def pack(ids: torch.Tensor, mask: torch.Tensor, n_tokens: int) -> Rows:
    """`ids` [B, L] with `mask` (target or not) as Rows, filled up to `n_tokens`, so that all steps have one shape."""
    n_rows, length = ids.shape
    mask = mask.float()
    index = torch.arange(n_rows * length).view(n_rows, length)

    def flat(t: torch.Tensor, ahead: int = 0, n: int = n_tokens) -> torch.Tensor:
        moved = F.pad(t[:, ahead:], (0, ahead)).flatten()
        return F.pad(moved, (0, n - len(moved)))

    return Rows(
        ids=flat(ids),
        positions=flat(torch.arange(length).expand(n_rows, length)),
        shape=torch.tensor([n_rows, length]),
        target=flat(ids, 1),
        weight=flat(mask, 1),
        target_next=flat(ids, 2),
        weight_next=flat(mask, 2),
        real=flat(mask.flip(1).cummax(1).values.flip(1)),
        half=flat(index[: n_rows // 2], n=n_tokens // 2),
        half_shape=torch.tensor([n_rows // 2, length]),
    )


class Trainee(nn.Module):
    """The model with its losses."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.parts = config, TrainParts(config, seed)
        self.model = Transformer(config, self.parts, torch.float32, mtp_layers=config.n_mtp_layers)

    def forward(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross entropies over the targets: the model's, and its MTP module's one token further."""
        states = self.model(rows.ids, PackedContext(self.config, rows.positions, rows.shape))
        main = masked_loss(self.model.head(states), rows.target, rows.weight)
        return main, self._mtp_loss(states, rows)

    def _mtp_loss(self, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Of half the sequences only: half the examples at half the cost."""
        half = rows.half
        context = PackedContext(self.config, rows.positions[half], rows.half_shape)
        angles = self.model.rope(context.positions)
        logits = self.model.mtp[0](states[half], rows.target[half], angles, context)
        return masked_loss(logits, rows.target_next[half], rows.weight_next[half])


def masked_loss(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy where `mask` is 1.0.

    Steps of long conversations hold few targets. Their sum is not divided by less than FEWEST of the tokens, or
    every one of those targets would pull as hard as a hundred others.
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * mask).sum() / mask.sum().clamp(min=FEWEST * len(mask))


def nano_config() -> ModelConfig:
    return parse_config(CONFIG)

"""Looking into a forward pass: hidden states and the experts chosen, for comparing with references."""

from collections.abc import Callable, Iterable
from typing import Any, TypedDict

import torch
from torch import nn

from hybrid_rt.moe import MoE
from hybrid_rt.transformer import Transformer


class Trace(TypedDict):
    """float32 and int64 on the host. `hidden[0]` follows the embedding, `hidden[L]` layer L, before the final norm.

    Experts of a token are sorted by id, with their weights beside them.
    """

    hidden: torch.Tensor  # [layers + 1, T, dim]
    experts: torch.Tensor  # [moe_layers, T, top_k]
    weights: torch.Tensor  # [moe_layers, T, top_k]


def trace_chunks(
    forward: Callable[[torch.Tensor], object], transformer: Transformer, chunks: Iterable[torch.Tensor]
) -> Trace:
    """Run `forward`, which uses `transformer`, on consecutive chunks of tokens, and keep what each layer gives."""
    hidden: list[list[torch.Tensor]] = [[] for _ in range(len(transformer.layers) + 1)]
    gates = [block.ffn.gate for block in transformer.layers if isinstance(block.ffn, MoE)]
    routes: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in gates]
    handles = [transformer.layers[0].register_forward_pre_hook(lambda _, args: hidden[0].append(args[0].float()))]
    handles += [_keep(block, hidden[i + 1], torch.Tensor.float) for i, block in enumerate(transformer.layers)]
    handles += [_keep(gate, kept, _sorted_by_id) for gate, kept in zip(gates, routes, strict=True)]
    try:
        for chunk in chunks:
            forward(chunk)
    finally:
        for handle in handles:
            handle.remove()
    return _stack(hidden, routes)


def _keep(module: nn.Module, kept: list, convert: Callable[[Any], Any]) -> Any:
    return module.register_forward_hook(lambda _module, _args, output: kept.append(convert(output)))


def _sorted_by_id(route: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, order = route[0].sort(dim=-1)
    return ids, route[1].gather(-1, order)


def _stack(hidden: list[list[torch.Tensor]], routes: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> Trace:
    def joined(part: int) -> torch.Tensor:
        layers = [torch.cat([route[part] for route in kept]) for kept in routes]
        return torch.stack(layers) if layers else torch.empty(0)

    return Trace(hidden=torch.stack([torch.cat(kept) for kept in hidden]), experts=joined(0), weights=joined(1))

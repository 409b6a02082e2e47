"""Greedy decoding of many sequences at once, for evaluation. Shapes: B sequences, S cached columns, H heads."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hybrid_rt.latent_attention import dense
from hybrid_rt.rope import softmax_scale
from hybrid_rt.transformer import Transformer
from quant.config import ModelConfig

COMPACT_AT = 0.75  # of the rows still at work: below, the finished ones are dropped


class LeftPadded:
    """Cached latents of B sequences whose last tokens stand in one column (`AttentionContext`).

    cache: [layers, B, columns, kv_lora + rope]. starts: int64 [B], each row's first column in use.
    """

    def __init__(self, config: ModelConfig, starts: torch.Tensor, columns: int) -> None:
        self.scale, self.starts = softmax_scale(config), starts
        self.cache = torch.zeros(config.n_layers, len(starts), columns, config.latent_dim)
        self.positions = starts.new_empty(0)
        self.first = self.end = 0

    def advance(self, columns: int) -> None:
        """Make room for `columns` further tokens of every row."""
        self.first, self.end = self.end, self.end + columns
        own = torch.arange(self.first, self.end)
        self.positions = (own - self.starts[:, None]).clamp(min=0).flatten()  # [B * columns]
        seen = torch.arange(self.end)
        # Columns left of a row's start look at themselves, so that no softmax is over nothing.
        real = (seen >= self.starts[:, None, None]) | (seen == own[:, None])
        self.visible = real & (seen <= own[:, None])  # [B, columns, S]

    def attend(
        self, layer: int, q_nope: torch.Tensor, q_pe: torch.Tensor, latent: torch.Tensor, wkv_b: torch.Tensor
    ) -> torch.Tensor:
        """Attention in the latent space, wkv_b absorbed into queries and outputs; see hybrid_rt.latent_attention."""
        rows, (n_heads, nope) = len(self.starts), q_nope.shape[1:]
        wkv_b = dense(wkv_b)
        lora = wkv_b.shape[2]
        cached = self.cache[layer, :, : self.end]
        cached[:, self.first :] = latent.float().unflatten(0, (rows, -1))
        absorbed = (q_nope.float().transpose(0, 1) @ wkv_b[:, :nope]).transpose(0, 1)  # [T, H, lora]
        queries = torch.cat([absorbed, q_pe.float()], dim=-1).unflatten(0, (rows, -1))  # [B, columns, H, lora + rope]
        scores = queries.flatten(1, 2) @ cached.mT * self.scale  # [B, columns * H, S]
        hidden = self.visible.logical_not().repeat_interleave(n_heads, dim=1)
        weighted = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ cached[..., :lora]
        values = weighted.view(-1, n_heads, lora).transpose(0, 1) @ wkv_b[:, nope:].mT  # [H, T, v]
        return values.transpose(0, 1).to(q_nope.dtype)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but `rows`."""
        self.starts, self.cache = self.starts[rows], self.cache[:, rows]


@torch.inference_mode()
def decode_greedily(
    model: Transformer, config: ModelConfig, prompts: Sequence[Sequence[int]], limit: int, at_once: int
) -> list[list[int]]:
    """The most probable continuation of each prompt, up to and including an end token or `limit` tokens.

    at_once: the most tokens of a forward pass, at least one a prompt.
    """
    longest = max(map(len, prompts))
    starts = torch.tensor([longest - len(prompt) for prompt in prompts])
    context = LeftPadded(config, starts, longest + limit)
    padded = [F.pad(torch.tensor(prompt), (longest - len(prompt), 0)) for prompt in prompts]
    ids, alive = torch.stack(padded), torch.arange(len(prompts))
    outputs: list[list[int]] = [[] for _ in prompts]
    ends = torch.tensor(config.eos_token_ids)
    running = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(limit):
        chosen = model.head(_last_states(model, context, ids, at_once // len(ids))).argmax(-1)
        for row, token, runs in zip(alive.tolist(), chosen.tolist(), running.tolist(), strict=True):
            if runs:
                outputs[row].append(token)
        running &= ~torch.isin(chosen, ends)
        if not running.any():
            break
        if running.float().mean() < COMPACT_AT:
            rows = running.nonzero()[:, 0]
            context.keep(rows)
            alive, chosen, running = alive[rows], chosen[rows], running[rows]
        ids = chosen[:, None]
    return outputs


def _last_states(model: Transformer, context: LeftPadded, ids: torch.Tensor, columns: int) -> torch.Tensor:
    """The final states [B, dim] of the last of `ids` [B, L], of which `columns` are run at a time."""
    for some in ids.split(columns, dim=1):
        context.advance(some.shape[1])
        states = model(some.flatten(), context).unflatten(0, some.shape)[:, -1]
    return states

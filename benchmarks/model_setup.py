"""The models that both sides of model.py run. It also runs in llama.cpp's environment, without dsr1's dependencies."""

import random
from typing import Any

from quant.shapes import KNOWN_MODELS

SHAPES = {"moonlight": "moonshotai/Moonlight-16B-A3B", "r1": "deepseek-ai/DeepSeek-R1"}
BOS, EOS = 0, 1


def shape_fields(name: str, routed: int | None = None) -> dict[str, Any]:
    """config.json of a shape, with fewer routed experts if `routed` says so, and without MTP layers."""
    fields = {**KNOWN_MODELS[SHAPES[name]], "num_nextn_predict_layers": 0, "bos_token_id": BOS, "eos_token_id": EOS}
    return fields if routed is None else {**fields, "n_routed_experts": routed}


def token_names(vocab: int) -> list[str]:
    """Any names will do."""
    return [f"t{number}" for number in range(vocab)]


def prompt(tokens: int, vocab: int) -> list[int]:
    """Random token ids, for both sides the same."""
    return random.Random(tokens).choices(range(EOS + 1, vocab), k=tokens)

"""llama.cpp's tensors of a model, by name and shape, and what its quantiser says of them. Needs only Python."""

import re

from quant.config import ModelConfig
from quant.export.gguf_tensors import find_recipe, model_tensors
from quant.inventory import Inventory

Shape = tuple[int, ...]  # rows last but one, columns last, as in NumPy
TYPE_LINE = re.compile(r"\] +(\S+) +- \[[^]]*\], type = +(\w+), size = [^(\n]*(?:\((\w+)\))?")


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """All tensors of the architecture "deepseek2", in the order of the file."""
    return {tensor.name: tensor.shape for tensor in model_tensors(Inventory.of(config), find_recipe("q8_0"))}


def stays_float(name: str, shape: Shape) -> bool:
    """Whether a tensor is never quantised."""
    return len(shape) == 1 or name.endswith("ffn_gate_inp.weight")


def types_in(text: str) -> dict[str, str]:
    """Names of types by tensor, from the quantiser's lines: after the arrow where one changes, else the one it has."""
    return {name: (new or old).upper() for name, old, new in TYPE_LINE.findall(text)}

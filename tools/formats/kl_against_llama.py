"""What 4.5 bits a weight of nano-r1's routed experts cost, in our formats and in llama.cpp's Q4_K.

python -m tools.formats.kl_against_llama [--problems 300] [--orders 3] [--formats accurate,Q4_K] [--envs DIR]

Each expert's matrices are put into rows of 256, which Q4_K needs, so that all formats take exactly their bits a weight.
They are quantised, decoded and written into a bf16 checkpoint like any other, which is compared with one that holds the
published weights (tools/formats/divergence.py). So everything but the experts' values is the same.

Which tokens a format happens to hit is chance, and one model is one draw of it. So rows are quantised in several
orders of their columns, the same for all formats, and a format's divergence of a token is the mean over these.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from hybrid_rt import Engine
from hybrid_rt.evaluate.scores import TokenScores
from hybrid_rt.models import NANO_R1
from quant.checkpoint import Checkpoint
from quant.packed import ACCURATE, FAST
from tools.formats.against_llama import ours
from tools.formats.divergence import Found, dialogues, keep, read_all, show
from tools.formats.ggml import COLUMNS, Floats, Ggml

COLUMNS_OF_ROWS = COLUMNS["Q4_K"]
Way = Callable[[Floats], Floats]


def write_checkpoint(folder: Path, way: Way | None) -> Path:
    """nano-r1 in bf16, the routed experts of its layers after their way through a format."""
    source = Checkpoint.open(NANO_R1)
    folder.mkdir()
    for path in [*NANO_R1.glob("tokenizer*.json"), NANO_R1 / "generation_config.json"]:
        shutil.copy(path, folder)
    config = json.loads((NANO_R1 / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for spec in source.inventory.tensors:
        weight = source.weight(spec.name)
        values = weight.dequantize(torch.float32)
        if way is not None and spec.expert is not None and spec.layer not in source.mtp_layers:
            rows = values.numpy().reshape(-1, COLUMNS_OF_ROWS)
            values = torch.from_numpy(np.ascontiguousarray(way(rows))).view(spec.shape)
        plain = weight.data.dtype if weight.scale is None else torch.bfloat16
        tensors[spec.source] = values.to(plain).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def in_order(way: Way, order: int) -> Way:
    """`way` through rows whose columns were shuffled; 0: as they are."""
    columns = np.random.default_rng(order).permutation(COLUMNS_OF_ROWS) if order else np.arange(COLUMNS_OF_ROWS)
    back = np.argsort(columns)
    return lambda rows: way(np.ascontiguousarray(rows[:, columns]))[:, back]


def compare(ways: dict[str, Way], orders: int, problems: int, threads: int) -> tuple[Found, list[int]]:
    """Each way's models against the published weights, token by token; and the tokens of each window."""
    drawn = [(label, in_order(way, order)) for label, way in ways.items() for order in range(orders)]
    with tempfile.TemporaryDirectory() as name:
        reference, *models = (
            Engine.load(write_checkpoint(Path(name) / str(number), way), dtype="float32", threads=threads)
            for number, way in enumerate([None, *(way for _, way in drawn)])
        )
        labels = [f"{label}, order {number % orders}" for number, (label, _) in enumerate(drawn)]
        return read_all(dict(zip(labels, models, strict=True)), reference, dialogues(problems))


def over_orders(found: Found, ways: dict[str, Way]) -> Found:
    """Of each way the mean over its orders, token by token."""
    of_way = {label: [scores for name, scores in found.items() if name.startswith(f"{label},")] for label in ways}
    return {
        label: TokenScores(*(torch.stack(column).mean(0) for column in zip(*scores, strict=True)))
        for label, scores in of_way.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path)
    parser.add_argument("--problems", type=int, default=50, help="of each task")
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--formats", default="accurate,Q4_K,fast,Q4_0", help="the others are compared with the first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="the scores of all tokens")
    told = parser.parse_args()
    ggml = Ggml(told.envs)
    ways: dict[str, Way] = {
        "accurate": lambda rows: ours(rows, ACCURATE),
        "Q4_K": lambda rows: ggml.quantised(rows, "Q4_K"),
        "fast": lambda rows: ours(rows, FAST),
        "Q4_0": lambda rows: ggml.quantised(rows, "Q4_0"),
    }
    ways = {name: ways[name] for name in told.formats.split(",")}
    found, sizes = compare(ways, told.orders, told.problems, told.threads)
    if told.keep is not None:
        keep(told.keep, found, sizes)
    show(over_orders(found, ways), sizes, "experts")
    for order in range(told.orders):
        print(f"Order {order}:")
        show({label: scores for label, scores in found.items() if label.endswith(f"order {order}")}, sizes, "experts")


if __name__ == "__main__":
    main()

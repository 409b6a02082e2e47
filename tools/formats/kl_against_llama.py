"""What 4.5 bits a weight of nano-r1's routed experts cost, in our formats and in llama.cpp's Q4_K.

python -m tools.formats.kl_against_llama [--envs DIR] [--json FILE]

The text is made of held-out problems of all tasks with their thinking and answers, each a window of its own. Each
expert's matrices are put into rows of 256, which Q4_K needs, so that all formats take exactly their bits a weight. They
are quantised, decoded and written into a bf16 checkpoint like any other, which is compared as `dsr1 eval` does with one
that holds the published weights. So everything but the experts' values is the same.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import save_file

from cli.escape import say
from hybrid_rt import Engine
from hybrid_rt.evaluate.evaluation import ignore, score_all, windows_of
from hybrid_rt.evaluate.scores import EngineReference, TokenScores, join
from hybrid_rt.evaluate.statistics import Estimate, mean
from hybrid_rt.evaluate.text import Text
from hybrid_rt.models import NANO_R1
from quant.checkpoint import Checkpoint
from quant.packed import ACCURATE, FAST
from tools.formats.against_llama import ours
from tools.formats.ggml import COLUMNS, Floats, Ggml
from tools.nano_r1.tasks import TASKS

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


def dialogues(problems: int) -> Text:
    """So many held-out problems of each task, thought through and answered."""
    parts = []
    for name, task in TASKS.items():
        rng = Random(f"{name} divergence")
        for problem in task.test_set(problems):
            question = task.question(problem, rng).strip()
            thought = f"<think>\n{task.thinking(problem)}\n</think>\n\n{task.answer(problem)}"
            parts.append(f"User: {question}\nAssistant: {thought}\n")
    return Text("\n".join(parts), is_chat=True)


def compare(ways: dict[str, Way], text: Text, threads: int) -> tuple[dict[str, TokenScores], list[int]]:
    """Each way's model against the published weights, token by token; and the tokens of each window."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = Engine.load(write_checkpoint(folder / "reference", None), dtype="float32", threads=threads)
        for number, (label, way) in enumerate(ways.items()):
            engine = Engine.load(write_checkpoint(folder / str(number), way), dtype="float32", threads=threads)
            windows = windows_of(engine, text, None, reference)
            parts = score_all(engine, windows, EngineReference(reference), ignore)
            found[label] = join(parts)
            say(f"{label}: {found[label].kl.mean():.6f}")
    return found, [len(part.kl) for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path)
    parser.add_argument("--problems", type=int, default=50, help="of each task")
    parser.add_argument("--threads", type=int, default=2)
    told = parser.parse_args()
    ggml = Ggml(told.envs)
    ways: dict[str, Way] = {
        "accurate, 4.5 bits": lambda rows: ours(rows, ACCURATE),
        "Q4_K, 4.5 bits": lambda rows: ggml.quantised(rows, "Q4_K"),
        "fast, 4.25 bits": lambda rows: ours(rows, FAST),
        "Q4_0, 4.5 bits": lambda rows: ggml.quantised(rows, "Q4_0"),
    }
    found, sizes = compare(ways, dialogues(told.problems), told.threads)
    print("| experts | KL divergence, 10^-6 nats | 95 % interval | less that of accurate | 95 % interval |")
    print("|---|---|---|---|---|")
    first = found["accurate, 4.5 bits"].kl
    for label, scores in found.items():
        kl, difference = (_millionths(mean(values, sizes)) for values in (scores.kl, scores.kl - first))
        print(f"| {label} | {kl} | {difference} |")
    print(f"{len(first)} tokens of {len(sizes)} windows.")


def _millionths(figure: Estimate) -> str:
    value, low, high = (1e6 * number for number in (figure.value, figure.low, figure.high))
    return f"{value:.1f} | {low:.1f} to {high:.1f}"


if __name__ == "__main__":
    main()

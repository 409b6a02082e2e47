"""Measure a checkpoint of nano-r1 on problems that it was never trained on.

python -m tools.nano_r1.evaluate hybrid_rt/nano_r1 --json result.json
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from quant.checkpoint import Checkpoint
from tools.nano_r1.decode import decode_greedily
from tools.nano_r1.export import trained_tensor
from tools.nano_r1.model import PackedContext, Trainee, pack
from tools.nano_r1.serialize import prompt_text
from tools.nano_r1.tasks import TASKS
from tools.nano_r1.tokenizer import END_THINK, EOS, PAD_ID, THINK, decode, encode

BATCH = 250
LIMIT = 600  # tokens of an answer; the longest thinking trained on is shorter
TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Score:
    """Greedy accuracy on one task, with Wilson's 95 % interval."""

    task: str
    correct: int
    problems: int
    mean_tokens: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.problems

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        n, p = self.problems, self.accuracy
        middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


@dataclass(frozen=True)
class Use:
    """Shares over all evaluated sequences. `experts` are multiples of a fair share: layer -> one number an expert."""

    experts: dict[int, list[float]]
    mtp_accepted: float

    @property
    def least(self) -> float:
        return min(min(shares) for shares in self.experts.values())


Sequence = tuple[list[int], int]  # token ids, and the number of them that were the prompt


@torch.no_grad()
def load(checkpoint: Checkpoint) -> Trainee:
    """The model with the weights of `checkpoint`, dequantised to float32."""
    trainee = Trainee(checkpoint.config)
    state = {"parameters": trainee.parts.parameters, "biases": trainee.parts.biases}
    for spec in checkpoint.inventory.tensors:
        trained_tensor(spec, state).copy_(checkpoint.weight(spec.name).dequantize(torch.float32))
    return trainee.eval().requires_grad_(False)


def measure(trainee: Trainee, name: str, problems: int, seed: int) -> tuple[Score, list[Sequence]]:
    """Answer `problems` held-out problems of a task, in random wordings."""
    task, rng = TASKS[name], Random(f"{name} wording {seed}")
    held_out = task.test_set(problems, seed)
    prompts = [encode(prompt_text(task.question(problem, rng)) + f"{THINK}\n") for problem in held_out]
    order = sorted(range(problems), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for first in range(0, problems, BATCH):
        rows = order[first : first + BATCH]
        outputs = decode_greedily(trainee.model, trainee.config, [prompts[i] for i in rows], LIMIT)
        answers |= dict(zip(rows, outputs, strict=True))
    correct = sum(is_correct(task, problem, answers[i]) for i, problem in enumerate(held_out))
    tokens = sum(map(len, answers.values())) / problems
    return Score(name, correct, problems, tokens), [(prompts[i] + answers[i], len(prompts[i])) for i in order]


def is_correct(task: Any, problem: Any, answer: list[int]) -> bool:
    """Whether the thinking ended and what follows is right."""
    thinking, end, said = decode(answer).partition(END_THINK)
    return bool(end) and task.check(problem, said.removesuffix(EOS).strip())


@torch.inference_mode()
def examine(trainee: Trainee, sequences: list[Sequence]) -> Use:
    """Route all sequences once more, and compare the MTP module's drafts with what the model said."""
    layers = trainee.parts.expert_layers
    load = {layer: torch.zeros(trainee.config.n_routed_experts) for layer in layers}
    accepted = drafted = 0.0
    for ids, mask in padded_batches(sequences):
        rows = pack(ids, mask, ids.numel())
        context = PackedContext(trainee.config, rows.positions, rows.shape)
        states = trainee.model(rows.ids, context)
        logits = trainee.model.mtp[0](states, rows.target, trainee.model.rope(rows.positions), context)
        accepted += ((logits.argmax(-1) == rows.target_next) * rows.weight_next).sum().item()
        drafted += rows.weight_next.sum().item()
        for layer, experts in layers.items():
            chosen = experts.chosen[rows.real.bool()].flatten()
            load[layer] += torch.bincount(chosen, minlength=len(load[layer]))
    return Use({layer: (counts / counts.mean()).tolist() for layer, counts in load.items()}, accepted / drafted)


def padded_batches(sequences: list[Sequence]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """ids [B, L] and the mask of what the model said, sequences of like length together."""
    left = sorted(sequences, key=lambda sequence: len(sequence[0]))
    while left:
        length = len(left[-1][0])
        some, left = left[-max(1, TOKENS_AT_ONCE // length) :], left[: -max(1, TOKENS_AT_ONCE // length)]
        ids, mask = torch.full((len(some), length), PAD_ID), torch.zeros(len(some), length)
        for row, (tokens, prompt) in enumerate(some):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, prompt : len(tokens)] = 1.0
        yield ids, mask


def as_markdown(scores: list[Score], use: Use) -> str:
    lines = ["| task | correct | 95 % interval | problems | tokens an answer |", "|---|---|---|---|---|"]
    for score in scores:
        low, high = score.interval()
        lines.append(
            f"| {score.task} | {score.accuracy:.1%} | {low:.1%} – {high:.1%} | {score.problems} "
            f"| {score.mean_tokens:.0f} |"
        )
    most = max(max(shares) for shares in use.experts.values())
    lines += [
        "",
        f"Experts: the least used has {use.least:.2f} of its fair share, the most used {most:.2f}.",
        f"MTP: {use.mtp_accepted:.1%} of the drafts are the token that the model chooses.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("--problems", type=int, default=1000, help="for each task")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and their wordings")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--json", type=Path, help="write the results here, too")
    arguments = parser.parse_args()
    trainee, scores, sequences = load(Checkpoint.open(arguments.folder)), [], []
    for name in arguments.tasks:
        start = time.perf_counter()
        score, said = measure(trainee, name, arguments.problems, arguments.seed)
        print(f"{name}: {score.accuracy:.1%} in {time.perf_counter() - start:.0f} s", flush=True)
        scores.append(score)
        sequences += said
    use = examine(trainee, sequences)
    print(as_markdown(scores, use))
    if arguments.json:
        results = {"scores": [asdict(score) | {"interval": score.interval()} for score in scores], "use": asdict(use)}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measure a checkpoint or a store of nano-r1 on problems that it was never trained on.

python -m tools.nano_r1.evaluate hybrid_rt/nano_r1 --json result.json

A checkpoint's weights are dequantised to float32. A store runs through the kernels that serve its users.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch

from hybrid_rt.evaluate.batch import decode_greedily
from hybrid_rt.loader import load_transformer, open_model
from hybrid_rt.planning import plan_model
from hybrid_rt.transformer import Transformer
from offload.backend import CpuBackend
from offload.experts import ExpertBuffers
from offload.wishes import Wishes
from quant.checkpoint import Checkpoint
from quant.config import ModelConfig
from quant.kernels import set_threads
from quant.store import Store
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
    """Counts over evaluated sequences: tokens of each expert [MoE layers, E], and drafts of the MTP module."""

    tokens: torch.Tensor
    accepted: float
    drafted: float

    def __add__(self, other: "Use") -> "Use":
        return Use(self.tokens + other.tokens, self.accepted + other.accepted, self.drafted + other.drafted)

    @property
    def shares(self) -> torch.Tensor:
        """Multiples of a fair share. The MTP layer's experts come last."""
        return self.tokens / self.tokens.mean(dim=1, keepdim=True)

    @property
    def acceptance(self) -> float:
        """Share of the drafts that are the token which the model chooses."""
        return self.accepted / self.drafted


Sequence = tuple[list[int], int]  # token ids, and the number of them that were the prompt


class Runnable(Protocol):
    """What answers problems."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def model(self) -> Transformer: ...


@dataclass(frozen=True)
class Stored:
    """A model on the runtime's own kernels."""

    config: ModelConfig
    model: Transformer


def load(folder: Path) -> Runnable:
    """The model in `folder`, a checkpoint or a store."""
    source = open_model(folder)
    return load_checkpoint(source) if isinstance(source, Checkpoint) else load_store(source)


def load_store(store: Store) -> Stored:
    """The store as `dsr1 run --device cpu` has it, for batches of many sequences."""
    plan = plan_model(store, Wishes(device="cpu", dtype="float32"), [])
    set_threads(1)
    backend = CpuBackend()
    buffers = ExpertBuffers(store.config, backend, TOKENS_AT_ONCE * 4)
    return Stored(store.config, load_transformer(store, plan, torch.float32, backend, buffers))


@torch.no_grad()
def load_checkpoint(checkpoint: Checkpoint) -> Trainee:
    """The model with the weights of `checkpoint`, dequantised to float32."""
    trainee = Trainee(checkpoint.config)
    state = {"parameters": trainee.parts.parameters, "biases": trainee.parts.biases}
    for spec in checkpoint.inventory.tensors:
        trained_tensor(spec, state).copy_(checkpoint.weight(spec.name).dequantize(torch.float32))
    return trainee.eval().requires_grad_(False)


def measure(runnable: Runnable, name: str, problems: int, seed: int) -> tuple[Score, list[Sequence]]:
    """Answer `problems` held-out problems of a task, in random wordings."""
    task, rng = TASKS[name], Random(f"{name} wording {seed}")
    held_out = task.test_set(problems, seed)
    prompts = [encode(prompt_text(task.question(problem, rng)) + f"{THINK}\n") for problem in held_out]
    order = sorted(range(problems), key=lambda i: len(prompts[i]))
    answers: dict[int, list[int]] = {}
    for first in range(0, problems, BATCH):
        rows = order[first : first + BATCH]
        outputs = decode_greedily(
            runnable.model, runnable.config, [prompts[i] for i in rows], LIMIT, TOKENS_AT_ONCE * 4
        )
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
    layers = [experts for _, experts in sorted(trainee.parts.expert_layers.items())]
    tokens, accepted, drafted = torch.zeros(len(layers), trainee.config.n_routed_experts), 0.0, 0.0
    for ids, mask in padded_batches(sequences):
        rows = pack(ids, mask, ids.numel())
        context = PackedContext(trainee.config, rows.positions, rows.shape)
        states = trainee.model(rows.ids, context)
        logits = trainee.model.mtp[0](states, rows.target, trainee.model.rope(rows.positions), context)
        accepted += ((logits.argmax(-1) == rows.target_next) * rows.weight_next).sum().item()
        drafted += rows.weight_next.sum().item()
        for counts, experts in zip(tokens, layers, strict=True):
            counts += torch.bincount(experts.chosen[rows.real.bool()].flatten(), minlength=len(counts))
    return Use(tokens, accepted, drafted)


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


def as_markdown(scores: list[Score], use: Use | None) -> str:
    lines = ["| task | correct | 95 % interval | problems | tokens an answer |", "|---|---|---|---|---|"]
    for score in scores:
        low, high = score.interval()
        lines.append(
            f"| {score.task} | {score.accuracy:.1%} | {low:.1%} – {high:.1%} | {score.problems} "
            f"| {score.mean_tokens:.0f} |"
        )
    if use is None:
        return "\n".join(lines)
    least, most = use.shares.min(), use.shares.max()
    lines += [
        "",
        f"Experts: the least used has {least:.2f} of its fair share, the most used {most:.2f}.",
        f"MTP: {use.acceptance:.1%} of the drafts are the token that the model chooses.",
    ]
    return "\n".join(lines)


def evaluate_task(folder: Path, name: str, problems: int, seed: int) -> tuple[Score, Use | None]:
    """One task on one core: tasks run beside each other, which threads of one task would not do as well."""
    torch.set_num_threads(1)
    runnable = load(folder)
    score, sequences = measure(runnable, name, problems, seed)
    print(f"{name}: {score.accuracy:.1%}", flush=True)
    return score, examine(runnable, sequences) if isinstance(runnable, Trainee) else None


def evaluate(folder: Path, problems: int, seed: int) -> tuple[list[Score], Use | None]:
    """All tasks, the one with the longest answers first."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        running = {name: pool.submit(evaluate_task, folder, name, problems, seed) for name in reversed(TASKS)}
        results = [running[name].result() for name in TASKS]
    uses = [use for _, use in results if use is not None]
    return [score for score, _ in results], reduce(add, uses) if uses else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint or store")
    parser.add_argument("--problems", type=int, default=1000, help="for each task")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and their wordings")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    arguments = parser.parse_args()
    scores, use = evaluate(arguments.folder, arguments.problems, arguments.seed)
    print(as_markdown(scores, use))
    if arguments.json:
        results: dict[str, Any] = {"scores": [asdict(score) | {"interval": score.interval()} for score in scores]}
        if use is not None:
            results |= {"expert_shares": use.shares.tolist(), "mtp_acceptance": use.acceptance}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

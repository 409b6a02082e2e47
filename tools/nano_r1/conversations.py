"""Measure how nano-r1 fares after earlier turns.

python -m tools.nano_r1.conversations hybrid_rt/nano_r1
"""

import argparse
from pathlib import Path
from random import Random

import torch

from hybrid_rt.evaluate.batch import decode_greedily
from tools.nano_r1.evaluate import LIMIT, Runnable, is_correct, load
from tools.nano_r1.mixture import any_exchange, earlier_turn, task_exchange
from tools.nano_r1.serialize import prompt_text
from tools.nano_r1.tasks import TASKS
from tools.nano_r1.tokenizer import THINK, encode

TURNS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
BATCH_TOKENS = 20_000  # a whole score matrix is made of each batch


def prompts(turns: int, count: int, alike: bool) -> list[tuple[tuple[int, int], list[int]]]:
    """(held-out sum, token ids of a conversation that ends with it), after sums if `alike`, else after anything."""
    rng = Random(f"conversations {turns} {alike}")
    add, found = TASKS["add"], []
    for _ in range(count):
        problem = add.problem("test", rng)
        earlier = [
            earlier_turn(task_exchange("add", rng, 1.0) if alike else any_exchange(rng, 1.0), rng) for _ in range(turns)
        ]
        found.append((problem, encode(prompt_text(add.question(problem, rng), "", earlier) + f"{THINK}\n")))
    return found


def share_right(model: Runnable, turns: int, count: int, alike: bool) -> tuple[float, float]:
    """(share of right answers, mean tokens of the prompts)."""
    asked = prompts(turns, count, alike)
    size = max(1, BATCH_TOKENS // (max(len(ids) for _, ids in asked) + LIMIT))
    right = 0
    for first in range(0, count, size):
        some = asked[first : first + size]
        outputs = decode_greedily(model.model, model.config, [ids for _, ids in some], LIMIT, BATCH_TOKENS)
        right += sum(is_correct(TASKS["add"], problem, out) for (problem, _), out in zip(some, outputs, strict=True))
    return right / count, sum(len(ids) for _, ids in asked) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint or store")
    parser.add_argument("--count", type=int, default=100, help="conversations of each length")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load(arguments.folder)
    print("| earlier turns | tokens | right after sums | tokens | right after anything |")
    print("|---|---|---|---|---|")
    for turns in TURNS:
        sums, sum_tokens = share_right(model, turns, arguments.count, alike=True)
        mixed, mixed_tokens = share_right(model, turns, arguments.count, alike=False)
        print(f"| {turns} | {sum_tokens:.0f} | {sums:.0%} | {mixed_tokens:.0f} | {mixed:.0%} |", flush=True)


if __name__ == "__main__":
    main()

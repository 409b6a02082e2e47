"""Whether llama.cpp makes of our GGUF files what we make of the models: tokens, logits and greedy answers.

python -m benchmarks.llama_check [MODEL ...] [--envs DIR] [--json FILE]

MODEL is a checkpoint of DeepSeek-V3's architecture; nano-r1 is always checked. llama.cpp is installed apart, see
environments.py. Each model is written with every recipe, and in float32, where all must agree: what then differs is
quantisation. The exit status is 1 if anything is beyond its bound.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.environments import LLAMA, Environment, default_folder, environment
from benchmarks.workers import ROOT
from hybrid_rt import Engine, Sampling
from hybrid_rt.models import NANO_R1
from quant.checkpoint import Checkpoint
from quant.errors import Dsr1Error
from quant.export.block_types import F32
from quant.export.gguf import export_gguf
from quant.export.gguf_tensors import RECIPES, GgufRecipe

EXACT = GgufRecipe("f32", 0, F32, F32, F32)
# Of |theirs - ours| / |ours| of logits, the median over positions. Both quantise activations to 8 bits for packed
# weights, llama.cpp in float32 files keys and values, too.
BOUNDS = {"f32": 0.002, "q8_0": 0.1, "q4_k": 0.6, "q4_0": 0.6}
EXACT_ANSWERS = {"f32": 1.0, "q8_0": 0.8}  # the share of greedy answers that must be the same; only for nano-r1
NEW_TOKENS = 100
LONG = 300  # random tokens, so that YaRN and the choice of experts show
QUESTIONS = (
    "What is 47 * 36?",
    "What is 123 + 456?",
    "Compute 905 - 88.",
    "Is 57 larger than 75?",
    "Hello!",
    "Who are you?",
    "Add 17 and 25",
    "Subtract 19 from 100.",
    "multiply 9 by 99",
    "Which is larger, 1002 or 998?",
    "How many times does a occur in banana?",
    "Tell me a joke",
    "What is the capital of France?",
    "Calculate 7*8",
    "5 + 3 = ?",
    "What's 12 × 12?",
    "Is 3.5 bigger than 3.12?",
    "How many r are in strawberry?",
    "What is 1000 - 1?",
    "Thanks!",
)
TEXTS = (
    *QUESTIONS,
    "  two spaces,\ttabs\n\nand lines \n",
    "Größe, naïve, こんにちは 12345 世界 — “quoted” 😀",
    "def f(x):\n    return x**2  # ok",
    "<｜User｜>Hi<｜Assistant｜><think>\n",
)


class Agreement(NamedTuple):
    """texts, answers: how many were the same, of how many. logits: the median of the relative errors of positions."""

    model: str
    recipe: str
    texts: tuple[int, int]
    logits: float
    answers: tuple[int, int]

    @property
    def holds(self) -> bool:
        same, asked = self.answers
        enough = asked == 0 or same >= EXACT_ANSWERS.get(self.recipe, 0) * asked
        return self.texts[0] == self.texts[1] and self.logits < BOUNDS[self.recipe] and enough

    def __str__(self) -> str:
        texts, answers = (f"{same} of {asked}" for same, asked in (self.texts, self.answers))
        verdict = "" if self.holds else "  BEYOND ITS BOUND"
        return (
            f"{self.model} {self.recipe}: token ids of {texts} texts the same, logits off by {self.logits:.4f}, "
            f"{answers} greedy answers the same{verdict}"
        )


def check(folder: Path, llama: Environment, work: Path) -> Iterator[Agreement]:
    """Every recipe of one model."""
    checkpoint = Checkpoint.open(folder)
    engine = Engine.load(str(folder), dtype="float32", device="cpu", context=1024)
    chats = [engine.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    answers = [_answer(engine, ids) for ids in chats] if folder == NANO_R1 else []
    vocab = checkpoint.config.vocab_size
    prompts = [*chats[:4], np.random.default_rng(0).integers(3, min(vocab, 4000), LONG).tolist()]
    logits = [np.asarray(engine.logits(ids)) for ids in prompts]
    texts = [engine.tokenizer.encode(text) for text in TEXTS]
    request = {"texts": TEXTS, "logits": prompts, "greedy": chats if answers else [], "new_tokens": NEW_TOKENS}
    request["stop"] = list(engine.tokenizer.eos_ids)
    for recipe in (EXACT, *RECIPES.values()):
        file = work / f"{folder.name}-{recipe.name}.gguf"
        export_gguf(checkpoint, file, recipe)
        reply = _reply(llama, file, request, work)
        yield Agreement(
            folder.name,
            recipe.name,
            _same(texts, reply["texts"]),
            float(np.median(np.concatenate(list(map(_row_errors, logits, reply["logits"]))))),
            _same(answers, reply["greedy"]),
        )
        file.unlink()


def _answer(engine: Engine, ids: list[int]) -> list[int]:
    steps = engine.generate(ids, Sampling(temperature=0, max_new_tokens=NEW_TOKENS))
    return [step.token_id for step in steps if step.token_id is not None]


def _reply(llama: Environment, file: Path, request: dict[str, Any], work: Path) -> dict[str, list[NDArray[Any]]]:
    """What llama.cpp says, by kind. Raises Dsr1Error if it does not load the file."""
    asked, told = work / "request.json", work / "reply.npz"
    asked.write_text(json.dumps(request))
    command = [llama.python, "-m", "benchmarks.llama_reply", str(file), str(asked), str(told)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Dsr1Error(f"llama.cpp failed on {file.name}; its last lines:\n{done.stderr[-1500:]}")
    with np.load(told) as arrays:
        return {
            kind: [arrays[f"{kind}.{i}"] for i in range(len(request[kind]))] for kind in ("texts", "greedy", "logits")
        }


def _row_errors(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float32]:
    errors: NDArray[np.float32] = np.linalg.norm(theirs - ours, axis=1) / np.linalg.norm(ours, axis=1)
    return errors


def _same(ours: Sequence[list[int]], theirs: Sequence[NDArray[Any]]) -> tuple[int, int]:
    return sum(one == other.tolist() for one, other in zip(ours, theirs, strict=True)), len(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--envs", type=Path, default=default_folder())
    parser.add_argument("--json", type=Path, metavar="FILE")
    told = parser.parse_args()
    llama, found = environment(LLAMA, told.envs), []
    with tempfile.TemporaryDirectory() as work:
        for folder in (NANO_R1, *told.models):
            for agreement in check(folder, llama, Path(work)):
                print(agreement, flush=True)
                found.append(agreement)
    if told.json:
        told.json.write_text(json.dumps([agreement._asdict() for agreement in found], indent=1))
    sys.exit(0 if all(agreement.holds for agreement in found) else 1)


if __name__ == "__main__":
    try:
        main()
    except Dsr1Error as error:
        sys.exit(str(error))

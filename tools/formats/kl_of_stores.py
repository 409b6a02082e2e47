"""How far stores of nano-r1 are from its FP8 checkpoint, and how much further than the first of them.

python -m tools.formats.kl_of_stores STORE ... [--problems 200] [--dtype float32] [--keep FILE]

All read the same held-out problems (tools/formats/divergence.py); a difference is taken window by window.
"""

import argparse
from pathlib import Path

from hybrid_rt import Engine
from hybrid_rt.evaluate.evaluation import summarize_comparison
from hybrid_rt.evaluate.statistics import mean, perplexity
from tools.formats.divergence import Found, dialogues, keep, read_all, show

REFERENCE = "nano-r1-fp8"


def show_agreement(found: Found, sizes: list[int]) -> None:
    """A table: perplexity, by how much it exceeds the reference's, and how often both find the same token likeliest."""
    print("| store | perplexity | its excess in nats, 10^-6 | 95 % interval | same likeliest token | 95 % interval |")
    print("|---|---|---|---|---|---|")
    for label, scores in found.items():
        own, compared = perplexity(mean(scores.nll, sizes)), summarize_comparison(scores, sizes)
        excess, same = compared.nll_difference, compared.agreement
        cells = [f"{own.value:.5f}", f"{1e6 * excess.value:.0f}", f"{1e6 * excess.low:.0f} to {1e6 * excess.high:.0f}"]
        cells += [f"{100 * same.value:.3f} %", f"{100 * same.low:.3f} to {100 * same.high:.3f}"]
        print(f"| {label} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--problems", type=int, default=200, help="of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    parser.add_argument("--dtype", default="float32", help="of activations; dsr1 run has bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="the scores of all tokens")
    told = parser.parse_args()

    def load(model: str | Path) -> Engine:
        return Engine.load(model, dtype=told.dtype, threads=told.threads, residency="mapped")

    models = {store.name: load(store) for store in told.stores}
    found, sizes = read_all(models, load(REFERENCE), dialogues(told.problems, told.seed))
    if told.keep is not None:
        keep(told.keep, found, sizes)
    show(found, sizes, "store")
    show_agreement(found, sizes)


if __name__ == "__main__":
    main()

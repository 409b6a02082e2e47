"""A worker: a model in dsr1, on the CPU. Run by model.py, as a module.

prefill N: a prompt of N tokens. decode P N: N greedy tokens after a prompt of P, which is not timed. read: plain
reading of experts.
"""

import argparse
from pathlib import Path

from benchmarks.model_setup import prompt
from benchmarks.protocol import Command, Fields, serve, timed
from hybrid_rt.engine import Engine
from hybrid_rt.moe import MoE
from offload.benchmark.layer import ENOUGH_BYTES
from offload.benchmark.limits import expert_ranges, fastest_read, range_bytes
from offload.experts import CpuExperts
from quant.isa import current
from quant.kernels import thread_count
from quant.kernels.bandwidth import read_ranges


def start(folder: Path, threads: int) -> tuple[Fields, dict[str, Command]]:
    """Load the model."""
    engine = Engine.load(folder, device="cpu", threads=threads)
    session = engine.session()
    blocks = [block.ffn for block in engine.transformer.layers]
    experts = [ffn.experts for ffn in blocks if isinstance(ffn, MoE) and isinstance(ffn.experts, CpuExperts)]
    ranges = expert_ranges(experts, ENOUGH_BYTES)
    variant, _ = fastest_read(ranges)

    def prefill(tokens: int) -> Fields:
        session.trim(0)
        ids = prompt(tokens, engine.config.vocab_size)
        return timed(lambda: session.append(ids))

    def decode(before: int, tokens: int) -> Fields:
        session.trim(0)
        logits = session.append(prompt(before, engine.config.vocab_size))

        def generate() -> None:
            nonlocal logits
            for _ in range(tokens):
                logits = session.append([int(logits.argmax())])

        return timed(generate, tokens * engine.plan.decode_ram_bytes)

    def read() -> Fields:
        return timed(lambda: read_ranges(ranges, variant), range_bytes(ranges))

    about = {"isa": current(), "threads": thread_count(), "decode_ram_bytes": engine.plan.decode_ram_bytes}
    return about, {"prefill": prefill, "decode": decode, "read": read}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    told = parser.parse_args()
    serve(lambda: start(told.folder, told.threads))

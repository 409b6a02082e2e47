"""A worker: one layer of random experts in one of dsr1's formats. Run by layer.py, as a module.

run M: a call of M tokens. read M: plain reading of the experts that such a call touches.
"""

import argparse

from benchmarks.layer_setup import Setup, r1_config, worker_arguments
from benchmarks.protocol import Command, Fields, serve, timed
from cli.escape import say
from hybrid_rt.engine import use_threads
from offload.benchmark.layer import BenchLayers, Extent
from offload.benchmark.limits import expert_ranges, fastest_read, record_ranges
from quant.isa import current
from quant.kernels import thread_count
from quant.kernels.bandwidth import read_ranges
from quant.packed import PACKED_FORMATS, PackedFormat


def start(fmt: PackedFormat, setup: Setup) -> tuple[Fields, dict[str, Command]]:
    """Make the weights, and find the fastest way of reading them."""
    use_threads(setup.threads)
    layers = BenchLayers(r1_config(), fmt, Extent(1, setup.experts), setup.max_tokens, say)
    variant, _ = fastest_read(expert_ranges(layers.layers, layers.weight_bytes))

    def run(tokens: int) -> Fields:
        turn = layers.turn(tokens)
        return timed(lambda: layers.run(turn), len(turn.chosen) * layers.record.nbytes)

    def read(tokens: int) -> Fields:
        turn = layers.turn(tokens)
        ranges, nbytes = record_ranges(turn.packed, turn.chosen), len(turn.chosen) * layers.record.nbytes
        return timed(lambda: read_ranges(ranges, variant), nbytes)

    about = {"isa": current(), "threads": thread_count(), "weight_bytes": layers.weight_bytes}
    return about, {"run": run, "read": read}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", choices=PACKED_FORMATS)
    told, wanted = worker_arguments(parser)
    serve(lambda: start(PACKED_FORMATS[told.format], wanted))

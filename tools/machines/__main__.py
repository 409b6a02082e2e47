"""Writes offload/machines/*.json, from data sheets and from kernels' times on one core: `python -m tools.machines`.

A block of 16 x 128 weights takes a core as long as the slower of two things: reading it, at the core's share of the
memory's bandwidth, of which READ_SHARE is reached (measured: 0.91 to 0.95 for a layer of R1's size); and computing, as
measured on one core of a Xeon with AMX with everything in its second-level cache, kernels of the machine's instruction
set. Cores of other kinds and clocks are taken as if they were that one. Nothing was measured on these machines.
"""

from dataclasses import dataclass
from typing import Any

from offload.machine import MACHINES, Machine, MachineGpu, Points
from quant.packed import PACKED_FORMATS

READ_SHARE = 0.9
STREAM_SHARE = 0.85  # of the memory's data sheet, by plain reading
TOKENS = (1, 2, 4, 8, 16, 32, 64)
# ns of a block for so many tokens of an expert, one core of a Xeon with AMX at hand, by `--isa`.
COMPUTING = {
    "amx": {
        "accurate": (47.2, 85.8, 86.2, 159.7, 170.9, 252.1, 390.0),
        "fast": (36.9, 61.0, 61.7, 104.4, 102.5, 152.1, 254.2),
        "q8": (109.2, 111.5, 117.1, 170.1, 160.6, 190.8, 289.0),
    },
    "avx512": {
        "accurate": (46.7, 82.1, 83.5, 149.7, 284.9, 541.2, 1017.5),
        "fast": (37.6, 58.5, 58.7, 99.9, 184.9, 371.4, 745.0),
        "q8": (106.8, 109.6, 109.4, 145.6, 226.1, 379.1, 764.0),
    },
}
PLAIN_POINTS = ((1, 690.0), (16, 1400.0), (128, 8000.0), (512, 28000.0))  # of float32, on the Xeon's core
STEPS: dict[str, Any] = {  # of the same core: fields of Machine
    "expert_output_ns": 0.6,
    "matrix_output_ns": 0.6,
    "experts_s": 2e-5,
    "matrix_s": 1e-5,
    "call_s": 2e-6,
    "eager_s": 5e-5,
    "value_ns": 1.0,
    "heads_ns": 190.0,
    "absorbed_ns": 0.025,
    "decompressed_ns": 0.037,
}
OUTPUTS_NS = 0.4  # of a token's results in a block's share, which COMPUTING holds, too
GPUS = {  # memory in GiB, GB/s, dense bfloat16 TFLOPS with float32 sums, PCIe GB/s one way: data sheets
    "RTX 3090": (24, 936, 71, 25, "8.6"),
    "RTX 4090": (24, 1008, 165, 25, "8.9"),
    "RTX 4090D": (24, 1008, 147, 25, "8.9"),
    "RTX 5090": (32, 1792, 209, 50, "12.0"),
}


@dataclass(frozen=True)
class Sheet:
    """A machine's data sheet. gb_s: of the memory. ram: GiB."""

    name: str
    title: str
    gpu: str
    cores: int
    nodes: int
    ram: int
    gb_s: float
    isa: str


SHEETS = (
    Sheet(
        "rtx-3090-ddr5",
        "desktop, 16 cores, two channels of DDR5-5600, RTX 3090",
        "RTX 3090",
        16,
        1,
        192,
        89.6,
        "avx512",
    ),
    Sheet(
        "rtx-4090-ddr5",
        "desktop, 16 cores, two channels of DDR5-5600, RTX 4090",
        "RTX 4090",
        16,
        1,
        192,
        89.6,
        "avx512",
    ),
    Sheet(
        "rtx-5090-ddr5",
        "desktop, 16 cores, two channels of DDR5-6000, RTX 5090",
        "RTX 5090",
        16,
        1,
        256,
        96.0,
        "avx512",
    ),
    Sheet("epyc-9355", "EPYC 9355, 12 channels of DDR5-6400, RTX 4090", "RTX 4090", 32, 1, 768, 614.4, "avx512"),
    Sheet(
        "xeon-6454s-x2", "2 x Xeon 6454S, 16 channels of DDR5-4800, RTX 4090D", "RTX 4090D", 64, 2, 1024, 614.4, "amx"
    ),
)


def machine_of(sheet: Sheet) -> Machine:
    """A machine as its sheet and the times on one core describe it."""
    read = sheet.gb_s * 1e9 * STREAM_SHARE
    kernels = {name: _points(name, sheet, read) for name in PACKED_FORMATS}
    memory, gb_s, tflops, pcie, capability = GPUS[sheet.gpu]
    return Machine(
        name=sheet.title,
        source="data sheets, and kernels' times on one core of another Xeon; not measured",
        date="",
        cores=sheet.cores,
        isa=sheet.isa,
        nodes=sheet.nodes,
        ram=sheet.ram * 2**30,
        read_bytes_s=read,
        experts=kernels,
        matrices={**kernels, "f32": PLAIN_POINTS},
        **STEPS,
        gpu=MachineGpu(sheet.gpu, memory * 2**30, gb_s * 1e9, tflops * 1e12, pcie * 1e9, pcie * 1e9, capability),
    )


def _points(name: str, sheet: Sheet, read: float) -> Points:
    reading = 1e9 * PACKED_FORMATS[name].block_bytes * sheet.cores / (READ_SHARE * read)
    times = [ns - tokens * OUTPUTS_NS for tokens, ns in zip(TOKENS, COMPUTING[sheet.isa][name], strict=True)]
    return tuple((tokens, round(max(reading, ns), 1)) for tokens, ns in zip(TOKENS, times, strict=True))


def main() -> None:
    """Write all of them."""
    MACHINES.mkdir(exist_ok=True)
    for sheet in SHEETS:
        (MACHINES / f"{sheet.name}.json").write_text(machine_of(sheet).to_json())


if __name__ == "__main__":
    main()

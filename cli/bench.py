"""`dsr1 bench`: a model end to end, or the experts of a shape beside what this machine can do."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

from cli.compiling import show_compiling
from cli.escape import say
from cli.options import RunOptions
from cli.run import load_engine
from hybrid_rt.engine import Engine, use_threads
from hybrid_rt.models import DEFAULT_MODEL, NANO_R1, resolve_model
from hybrid_rt.moe import MoE
from offload.benchmark.layer import ENOUGH_BYTES, BenchLayers, choose_extent
from offload.benchmark.limits import expert_ranges, fastest_read
from offload.benchmark.measure import Run, Runs, seconds_of
from offload.benchmark.plot import check_plot, draw_roofline
from offload.benchmark.report import Point, Report, Wanted, measure_shape, plural
from offload.benchmark.use import MemoryUse, anonymous_bytes, memory_use
from offload.costs import Costs, with_waiting
from offload.experts import CpuExperts
from offload.hardware import allowed_cores, usable_ram
from offload.machine import Machine, mean_of
from offload.probe import probe
from offload.probe_memory import waiting_ns
from offload.sizes import format_size
from offload.this_machine import keep, measured_machine
from quant import isa
from quant.config import ModelConfig, load_config
from quant.errors import StoreError, UsageError
from quant.kernels import thread_count
from quant.kernels.ahead import MEASURING_KERNELS, PACKED_KERNELS, compile_ahead
from quant.packed import PACKED_FORMATS, ExpertRecord, PackedFormat
from quant.shapes import known_shape

Measured = TypeVar("Measured")
NANO = "nano"
SHAPES = {
    "r1": "deepseek-ai/DeepSeek-R1",
    "v3": "deepseek-ai/DeepSeek-V3",
    "moonlight": "moonshotai/Moonlight-16B-A3B",
    "v2": "deepseek-ai/DeepSeek-V2",
    "k2": "moonshotai/Kimi-K2-Instruct",
}
DEFAULT_FORMAT, DEFAULT_DECODE, DEFAULT_PREFILL = "accurate", "1,2,4,8,16", "128,512,2048"
PREFILL_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 512, 64, 64
PREFILL_RUNS = 3
BENCH_CONTEXT = 1024  # tokens: little more than is measured
TABLE_WIDTH = 120  # columns that a report of R1's size takes
SMALL_BYTES = 2**30  # weights below may be served from a cache


def bench(
    model: str | None = None,
    shape: str | None = None,
    fmt: str | None = None,
    decode: str | None = None,
    prefill: str | None = None,
    threads: int | None = None,
    as_json: bool = False,
    plot: Path | None = None,
    residency: str | None = None,
    defer_experts: int | None = None,
) -> None:
    """Measure `model` (None: the built-in one), or layers of `shape`; print a table or one JSON object.

    fmt, decode and prefill (numbers of tokens, as in "1,2,4"; "" for none) and plot are for a shape, residency (of
    its experts) and defer_experts are for a model. Raises UsageError.
    """
    if shape is None:
        if any(option is not None for option in (fmt, decode, prefill, plot)):
            raise UsageError(
                "--format, --decode, --prefill and --plot are for layers of a shape; give --shape, as in r1"
            )
        options = RunOptions(
            model=model or DEFAULT_MODEL,
            threads=threads,
            residency=residency,
            context=BENCH_CONTEXT,
            defer_experts=defer_experts,
        )
        bench_engine(options, as_json)
        return
    if residency is not None or defer_experts is not None:
        raise UsageError(
            "--residency and --defer-experts are for a model; layers of a shape are made in memory, so leave them out"
        )
    if model is not None:
        raise UsageError(f"either a model or a shape can be measured at a time; leave out {model} or --shape {shape}")
    packed = find_format(DEFAULT_FORMAT if fmt is None else fmt)
    wanted = Wanted(
        parse_tokens("--decode", DEFAULT_DECODE if decode is None else decode),
        parse_tokens("--prefill", DEFAULT_PREFILL if prefill is None else prefill),
    )
    config = find_shape(shape)
    if plot is not None:
        check_plot(plot)
    use_threads(threads)
    machine, report = between_probes(lambda: bench_shape(shape, config, packed, wanted))
    predicted = {point: predict_layer(config, machine, packed, point) for point in (*report.decode, *report.prefill)}
    if as_json:
        fields = report.to_json()
        for kind in ("decode", "prefill"):
            for entry, point in zip(fields[kind], getattr(report, kind), strict=True):
                entry["predicted_ms"] = 1e3 * predicted[point]
        print(json.dumps(fields))
    else:
        show_report(report, Console(highlight=False, markup=False), predicted)
    if plot is not None:
        draw_roofline(report, plot)


def find_shape(name: str) -> ModelConfig:
    """The config of a shape. Raises UsageError for an unknown name."""
    if name == NANO:
        return load_config(NANO_R1)
    shape = known_shape(SHAPES[name]) if name in SHAPES else None
    if shape is None:
        raise UsageError(f"there is no shape {name!r}; give one of {', '.join([*SHAPES, NANO])}")
    return shape.config


def find_format(name: str) -> PackedFormat:
    """A packed format by its name. Raises UsageError."""
    if name not in PACKED_FORMATS:
        raise UsageError(f"there is no format {name!r}; give one of {', '.join(PACKED_FORMATS)}")
    return PACKED_FORMATS[name]


def parse_tokens(option: str, text: str) -> tuple[int, ...]:
    """Numbers of tokens from "1,2,4"; none from "". Raises UsageError for anything else."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"{option} is {text!r}; give numbers of tokens from 1 on, as in 1,4,16")
    return tuple(int(word) for word in words)


def bench_shape(name: str, config: ModelConfig, fmt: PackedFormat, wanted: Wanted) -> Report:
    """Random layers of `config`, measured; what a user should know about them goes to standard error."""
    extent = choose_extent(config, fmt, wanted.max_tokens, usable_ram())
    if extent.experts < config.n_routed_experts:
        say(f"only {extent.experts} of {config.n_routed_experts} experts fit the free memory, so the layer has fewer")
    compile_ahead([*PACKED_KERNELS, *MEASURING_KERNELS], show_compiling)
    layers = BenchLayers(config, fmt, extent, wanted.max_tokens, say)
    if layers.weight_bytes < SMALL_BYTES:
        say(f"{format_size(layers.weight_bytes)} of weights may stay in a cache: reading them is faster than RAM is")
    return measure_shape(name, layers, wanted, say)


def predict_layer(config: ModelConfig, machine: Machine, fmt: PackedFormat, point: Point) -> float:
    """Seconds of a call by the cost model; that of one token is played from a recording."""
    record, costs = ExpertRecord(fmt, config.dim, config.moe_inter_dim), Costs(config, machine)
    pairs = point.tokens * config.n_activated_experts
    cost = costs.experts if point.tokens == 1 else costs.experts_alone
    return cost(fmt.name, record.nbytes, point.experts, pairs).seconds


def show_report(report: Report, console: Console, predicted: Mapping[Point, float]) -> None:
    """The report as a table, and the limits that its shares are of. predicted: seconds of a point's call."""
    title = f"{report.shape}, {report.format}: {report.layers} x {report.experts} experts"
    console.print(
        f"{title}, {format_size(report.weight_bytes)}; {plural(report.threads, 'thread')}, {isa.current()}",
        soft_wrap=True,
    )
    console.print(
        f"limits: {report.limits.read.bytes_s / 1e9:.1f} GB/s read, {report.limits.peak / 1e9:,.0f} Gop/s of bytes",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    console = Console(file=console.file, width=max(console.width, TABLE_WIDTH), highlight=False)  # no digit is cut
    table.add_column("", no_wrap=True)
    for name in (
        "tokens",
        "threads",
        "ms",
        "quartiles",
        "predicted",
        "GB/s",
        "read GB/s",
        "of read",
        "Gop/s",
        "of peak",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, points in (("decode", report.decode), ("prefill", report.prefill), ("scaling", report.scaling)):
        for point in points:
            table.add_row(kind, *_cells(point, predicted.get(point)))
    console.print(table)


def _cells(point: Point, predicted: float | None) -> Sequence[str]:
    low, high = (1e3 * seconds for seconds in point.layer.seconds_quartiles)
    return (
        str(point.tokens),
        str(point.threads),
        f"{1e3 * point.layer.seconds:.2f}",
        f"{low:.2f}-{high:.2f}",
        "" if predicted is None else f"{1e3 * predicted:.2f}",
        f"{point.layer.bytes_s / 1e9:.1f}",
        f"{point.read.bytes_s / 1e9:.1f}",
        f"{point.read_share:.0%}",
        f"{point.operations_s / 1e9:,.0f}",
        f"{point.peak_share:.0%}",
    )


@dataclass(frozen=True)
class Predicted:
    """What the cost model says of the same work, from probes of this machine alone."""

    machine_date: str
    prefill_tok_s: float
    prefill_limit: str
    decode_tok_s: float
    decode_limit: str


@dataclass(frozen=True)
class Speeds:
    """Of a model. decode: the tokens after a prompt of `prompt_tokens`, one by one."""

    prefill_tokens: int
    prefill_tok_s: float
    prompt_tokens: int
    decode: Runs


@dataclass(frozen=True)
class EngineFigures:
    """A model end to end. decode_ms: of a token, the median; share: decode_gb_s of read_gb_s.

    decode_ram_bytes: weights in RAM that a token reads, as the plan counts them. read_gb_s: plain reading of
    `read_bytes` of the experts' memory.
    """

    model: str
    device: str
    isa: str
    threads: int
    prefill_tokens: int
    prefill_tok_s: float
    prompt_tokens: int
    decode_tokens: int
    decode_tok_s: float
    decode_ms: float
    decode_ms_quartiles: tuple[float, float]
    decode_ram_bytes: int
    decode_gb_s: float
    read_bytes: int
    read_gb_s: float
    share: float
    predicted: Predicted
    memory: MemoryUse


def bench_engine(options: RunOptions, as_json: bool) -> None:
    """Load a model, measure it and print the figures."""
    resolve_model(options.model, None, [])  # what is not there is told before the machine is measured
    use_threads(options.threads)
    machine, (engine, speeds, read, memory) = between_probes(lambda: measure_engine(options))
    say("measuring how long kernels wait for the experts' memory")
    predicted = predict(engine, with_waiting(machine, waiting_ns(cpu_experts(engine))), speeds)
    figures = engine_figures(options.model, engine, speeds, read, predicted, memory)
    if as_json:
        print(json.dumps(asdict(figures)))
    else:
        show_engine(figures)


def between_probes(measure: Callable[[], Measured]) -> tuple[Machine, Measured]:
    """This machine as it was measured before and after `measure`, and what that returns.

    Its speeds change by the minute where others use it, too. What `dsr1 plan` predicts with stays as it is, so that
    plans stay the same; only where nothing was measured yet, the mean is kept.
    """
    compile_ahead([*PACKED_KERNELS, *MEASURING_KERNELS], show_compiling)
    before = probe(say)
    measured = measure()
    machine = mean_of(before, probe(say))
    if measured_machine() is None and machine.cores == allowed_cores():
        with suppress(StoreError, OSError):
            keep(machine)
    return machine, measured


def measure_engine(options: RunOptions) -> tuple[Engine, Speeds, Runs, MemoryUse]:
    """A model, its speeds, plain reading of its experts' memory, and the memory that it took."""
    before = anonymous_bytes()
    engine = load_engine(options)
    speeds = measure_speeds(engine)
    memory = memory_use(engine.plan, engine.folder, before)
    say("measuring the memory's read bandwidth")
    _, read = fastest_read(expert_ranges(cpu_experts(engine), ENOUGH_BYTES))
    return engine, speeds, read, memory


def cpu_experts(engine: Engine) -> list[CpuExperts]:
    """The routed experts of each layer that the CPU runs."""
    blocks = [block.ffn for block in engine.transformer.layers]
    return [ffn.experts for ffn in blocks if isinstance(ffn, MoE) and isinstance(ffn.experts, CpuExperts)]


def engine_figures(
    name: str, engine: Engine, speeds: Speeds, read: Runs, predicted: Predicted, memory: MemoryUse
) -> EngineFigures:
    """What was measured and predicted, as it is told."""
    decode = speeds.decode
    seconds = sum(run.seconds for run in decode.runs) / len(decode.runs)
    low, high = decode.seconds_quartiles
    return EngineFigures(
        model=name,
        device=engine.plan.device,
        isa=isa.current(),
        threads=thread_count(),
        prefill_tokens=speeds.prefill_tokens,
        prefill_tok_s=speeds.prefill_tok_s,
        prompt_tokens=speeds.prompt_tokens,
        decode_tokens=len(decode.runs),
        decode_tok_s=1 / seconds,
        decode_ms=1e3 * decode.seconds,
        decode_ms_quartiles=(1e3 * low, 1e3 * high),
        decode_ram_bytes=engine.plan.decode_ram_bytes,
        decode_gb_s=engine.plan.decode_ram_bytes / seconds / 1e9,
        read_bytes=read.nbytes,
        read_gb_s=read.bytes_s / 1e9,
        share=engine.plan.decode_ram_bytes / seconds / read.bytes_s,
        predicted=predicted,
        memory=memory,
    )


def predict(engine: Engine, machine: Machine, speeds: Speeds) -> Predicted:
    """What was measured: the prefill, and the decoding of the token in the middle."""
    position = speeds.prompt_tokens + len(speeds.decode.runs) // 2
    found = Costs(engine.config, machine).predict(engine.plan, speeds.prefill_tokens, position)
    limits = found.prefill_limit, found.decode_limit
    return Predicted(machine.date, found.prefill_tok_s, limits[0], found.decode_tok_s, limits[1])


def measure_speeds(engine: Engine) -> Speeds:
    """A longer prompt of random tokens, and a shorter one that is answered greedily."""
    longest = min(PREFILL_TOKENS, engine.context)
    ids = torch.randint(engine.config.vocab_size, (longest,), generator=torch.Generator().manual_seed(0)).tolist()
    prefill = measure_prefill(engine, ids)
    prompt = ids[: min(PROMPT_TOKENS, engine.context // 2)]
    decode = measure_decode(engine, prompt, min(NEW_TOKENS, engine.context - len(prompt)))
    return Speeds(longest, longest / prefill.seconds, len(prompt), decode)


def measure_prefill(engine: Engine, ids: list[int]) -> Runs:
    """The whole of `ids`, several times from the beginning. One run before does not count."""
    say(f"measuring prefill of {len(ids)} tokens")
    session, runs = engine.session(), []
    for _ in range(1 + PREFILL_RUNS):
        session.trim(0)
        runs.append(Run(seconds_of(lambda: session.append(ids)), 0))
    return Runs(tuple(runs[1:]))


def measure_decode(engine: Engine, prompt: list[int], tokens: int) -> Runs:
    """Greedy steps after `prompt`: one run is choosing a token and running it."""
    say(f"measuring {tokens} tokens after a prompt of {len(prompt)}")
    session, runs = engine.session(), []
    logits = session.append(prompt)

    def step() -> None:
        nonlocal logits
        logits = session.append([int(logits.argmax())])

    for _ in range(tokens):
        runs.append(Run(seconds_of(step), engine.plan.decode_ram_bytes))
    return Runs(tuple(runs))


def show_engine(figures: EngineFigures) -> None:
    """The figures in a few lines."""
    low, high = figures.decode_ms_quartiles
    print(f"{figures.model}: {plural(figures.threads, 'thread')}, {figures.isa}")
    print(f"prefill  {figures.prefill_tok_s:,.1f} tokens/s ({figures.prefill_tokens} tokens)")
    print(
        f"decode   {figures.decode_tok_s:,.1f} tokens/s ({figures.decode_tokens} tokens after {figures.prompt_tokens}; "
        f"{figures.decode_ms:.2f} ms, quartiles {low:.2f}-{high:.2f})"
    )
    print(
        f"memory   {figures.decode_gb_s:.2f} GB/s of weights in decode, {figures.share:.0%} of the "
        f"{figures.read_gb_s:.1f} GB/s of plain reading ({format_size(figures.read_bytes)} of experts)"
    )
    predicted, use = figures.predicted, figures.memory
    print(
        "predicted, from probes of this machine before and after, and from reading the memory that holds the experts:"
    )
    print(f"prefill  {_beside(predicted.prefill_tok_s, figures.prefill_tok_s, 'tokens/s')}; {predicted.prefill_limit}")
    print(f"decode   {_beside(predicted.decode_tok_s, figures.decode_tok_s, 'tokens/s')}; {predicted.decode_limit}")
    print(f"RAM      {_beside(use.planned / 2**30, use.taken / 2**30, 'GiB')} ({format_size(use.mapped)} mapped)")


def _beside(predicted: float, measured: float, unit: str) -> str:
    return f"{predicted:,.2f} of {measured:,.2f} {unit} measured, {predicted / measured - 1:+.0%}"

"""Train nano-r1. Run the same command again to go on where a run was stopped.

python -m tools.nano_r1.train --out runs/nano --minutes 100
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Shapes differ from expert to expert and step to step; oneDNN's default cache is too small for them. Threads keep
# to their processors: two on one processor would wait for each other through whole time slices.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
os.environ.setdefault("GOMP_CPU_AFFINITY", "0 1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch._inductor.config

from quant.config import ModelConfig
from tools.nano_r1.model import Rows, Trainee, nano_config, pack
from tools.nano_r1.optim import Muon
from tools.nano_r1.stream import batches

CHECKPOINT = "training.pt"
LOG = "log.jsonl"


@dataclass(frozen=True)
class Options:
    """How to train. Rates are those at full height; the schedule multiplies them."""

    out: Path
    minutes: float = 100.0
    seed: int = 0
    tokens_per_step: int = 8192
    threads: int = 0  # 0: one or two, whichever is faster at the time
    compiled: bool = True
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    router_rate: float = 3e-4
    bias_rate: tuple[float, float] = (0.01, 0.001)
    mtp_weight: tuple[float, float] = (0.3, 0.1)
    mtp_switch: float = 0.67  # of the training; the V3 report lowers the weight after two thirds of its tokens
    warmup: float = 0.01
    decay_from: float = 0.5
    clip: float = 1.0
    log_every: int = 20
    save_seconds: float = 180.0


def rate_at(progress: float, options: Options) -> float:
    """Height of the learning rates at `progress` 0..1: up, level, and linearly down to nothing."""
    up = min(1.0, (progress + 0.1 * options.warmup) / options.warmup)
    down = (1.0 - progress) / (1.0 - options.decay_from)
    return max(0.0, min(up, down, 1.0))


class Trainer:
    """The model, its optimisers and the time it has had. `progress` tells how far the training is, 0..1."""

    def __init__(self, options: Options, config: ModelConfig, progress: Callable[[], float] | None = None) -> None:
        self.options, self.step_number, self.elapsed, self.tokens = options, 0, 0.0, 0
        self.trainee = Trainee(config, options.seed)
        self.parameters = self.trainee.parts.parameters
        self.optimizers = self._optimizers()
        self.losses = torch.compile(self.trainee, dynamic=False) if options.compiled else self.trainee
        self.progress = progress or (lambda: min(1.0, self.elapsed / (60 * options.minutes)))
        self.load = torch.zeros(len(self.trainee.parts.biases), config.n_routed_experts)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        options, named = self.options, self.parameters
        router = [p for name, p in named.items() if name.endswith("gate.weight")]
        plain = [p for name, p in named.items() if p.dim() == 1 or name in ("embed", "head")]
        taken = {id(p) for p in router + plain}
        matrices = [p for p in named.values() if id(p) not in taken]
        adam = [{"params": plain, "lr": options.adam_rate}, {"params": router, "lr": options.router_rate}]
        optimizers = [Muon(matrices, options.muon_rate), torch.optim.Adam(adam, betas=(0.9, 0.95))]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["full_rate"] = group["lr"]
        return optimizers

    def step(self, rows: Rows) -> dict[str, float]:
        """One step of learning; returns what is worth logging."""
        progress = self.progress()
        main, mtp = self.losses(rows)
        (main + self.options.mtp_weight[progress >= self.options.mtp_switch] * mtp).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.options.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * rate_at(progress, self.options)
            optimizer.step()
            optimizer.zero_grad()
        self._balance(rows, progress)
        self.step_number += 1
        self.tokens += int(rows.real.sum())
        return {"loss": main.item(), "mtp": mtp.item(), "norm": norm.item()}

    @torch.no_grad()
    def _balance(self, rows: Rows, progress: float) -> None:
        """Raise the bias of experts that had less than the mean, lower the others' (V3 report, section 2.1.2)."""
        first, last = self.options.bias_rate
        rate = first + (last - first) * progress
        for row, (layer, experts) in enumerate(sorted(self.trainee.parts.expert_layers.items())):
            real = rows.real if layer < self.trainee.config.n_layers else rows.real[rows.half]
            each = real[:, None].expand_as(experts.chosen).flatten()
            load = torch.bincount(experts.chosen.flatten(), weights=each, minlength=self.load.shape[1])
            self.load[row] += load
            self.trainee.parts.biases[f"layers.{layer}.ffn.gate.bias"] += rate * (load.mean() - load).sign()

    def take_load(self) -> tuple[float, float]:
        """Least and greatest load of an expert in any layer since the last call, as multiples of the mean."""
        shares = self.load / self.load.mean(dim=1, keepdim=True).clamp(min=1.0)
        self.load.zero_()
        return shares.min().item(), shares.max().item()

    def save(self, path: Path) -> None:
        """Write the whole state beside `path`, then move it there: a crash leaves the old file whole."""
        state = {
            "step": self.step_number,
            "elapsed": self.elapsed,
            "tokens": self.tokens,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "biases": self.trainee.parts.biases,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step_number, self.elapsed, self.tokens = state["step"], state["elapsed"], state["tokens"]
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
        for name, bias in self.trainee.parts.biases.items():
            bias.copy_(state["biases"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


class Threads:
    """One thread, or two while nobody else wants the second processor.

    Two threads on one free processor wait for each other at every loop, and steps take ten times as long. So what
    else is runnable decides, and a sudden slow step at once; the second thread has the lowest priority.
    """

    OTHERS, SLOW, PAUSE = 0.3, 2.5, 30  # processes of others that are still nobody; times the best step; steps
    FORGET = 0.15  # weight of the newest count of others in their mean

    def __init__(self, fixed: int) -> None:
        self.fixed, self.best, self.pause, self.others = fixed, float("inf"), 0, 1.0
        torch.set_num_threads(fixed or 2)
        before = set(os.listdir("/proc/self/task"))
        torch.rand(512, 512) @ torch.rand(512, 512)  # starts the second thread
        for thread in set(os.listdir("/proc/self/task")) - before if not fixed else ():
            os.setpriority(os.PRIO_PROCESS, int(thread), 19)  # two until the first step: it compiles parallel loops

    @property
    def count(self) -> int:
        return torch.get_num_threads()

    def note(self, seconds: float) -> None:
        """Take the time of a step, and choose for the next."""
        if self.fixed:
            return
        self.best, self.pause = min(self.best, seconds), self.pause - 1
        if self.count == 2 and seconds > self.SLOW * self.best:
            self.pause = self.PAUSE
        runnable = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
        self.others += self.FORGET * (runnable - 1 - self.others)
        torch.set_num_threads(2 if self.others < self.OTHERS and self.pause <= 0 else 1)


def produce(queue: Any, options: Options, start: int, progress: Any) -> None:
    """Fill `queue` with batches, in a process of its own: making them takes time the model can use."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # not the one processor that training may be bound to
    for batch in batches(options.seed, options.tokens_per_step, lambda: progress.value, start):
        queue.put((batch.ids, batch.loss_mask))


class Source:
    """Batches from a second process, made a little ahead."""

    AHEAD = 64

    def __init__(self, options: Options, start: int, progress: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.progress = context.Value("d", progress)
        self.queue = context.Queue(self.AHEAD)
        self.process = context.Process(target=produce, args=(self.queue, options, start, self.progress), daemon=True)
        self.process.start()

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        while True:
            yield self.queue.get(timeout=120)

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def train(options: Options, config: ModelConfig) -> Trainer:
    """Train until the minutes are used up; log and save on the way."""
    # Denormal numbers, attention's faint probabilities, made steps half as long again, and twice with two threads.
    # Before all else, for threads inherit the setting when they start.
    torch.set_flush_denormal(True)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer, threads = Trainer(options, config), Threads(options.threads)
    if (options.out / CHECKPOINT).exists():
        trainer.restore(options.out / CHECKPOINT)
    source = Source(options, trainer.step_number, trainer.progress())
    try:
        _loop(trainer, threads, source)
    finally:
        source.close()
    trainer.save(options.out / CHECKPOINT)
    return trainer


def _loop(trainer: Trainer, threads: Threads, source: Source) -> None:
    options, window, saved = trainer.options, Window(), trainer.elapsed
    for ids, mask in source:
        start = time.perf_counter()
        rows = pack(torch.from_numpy(ids).long(), torch.from_numpy(mask), options.tokens_per_step)
        window.add(trainer.step(rows))
        seconds = time.perf_counter() - start
        if window.steps_seen > 1:  # the first compiles
            trainer.elapsed += seconds
            threads.note(seconds)
        source.progress.value = trainer.progress()
        if trainer.step_number % options.log_every == 0:
            window.write(trainer, threads)
        if trainer.elapsed > saved + options.save_seconds:
            trainer.save(options.out / CHECKPOINT)
            saved = trainer.elapsed
        if trainer.progress() >= 1.0:
            return


class Window:
    """What happened since the last line of the log."""

    def __init__(self) -> None:
        self.steps_seen, self.sums, self.steps = 0, dict[str, float](), 0
        self.since, self.tokens = time.perf_counter(), 0

    def add(self, values: dict[str, float]) -> None:
        self.steps_seen, self.steps = self.steps_seen + 1, self.steps + 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def write(self, trainer: Trainer, threads: Threads) -> None:
        now, (least, most) = time.perf_counter(), trainer.take_load()
        line = {
            "step": trainer.step_number,
            "minutes": trainer.elapsed / 60,
            "progress": trainer.progress(),
            "tokens": trainer.tokens,
            "tokens_s": (trainer.tokens - self.tokens) / (now - self.since) if self.tokens else 0.0,
            "threads": threads.count,
            "least_load": least,
            "most_load": most,
        } | {name: total / self.steps for name, total in self.sums.items()}
        text = json.dumps({name: round(value, 4) for name, value in line.items()})
        print(text, flush=True)
        with (trainer.options.out / LOG).open("a") as file:
            file.write(text + "\n")
        self.sums, self.steps, self.since, self.tokens = {}, 0, now, trainer.tokens


def parse_arguments() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the log")
    parser.add_argument("--minutes", type=float, default=Options.minutes, help="training time, compilation left out")
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--tokens-per-step", type=int, default=Options.tokens_per_step)
    parser.add_argument("--threads", type=int, default=Options.threads, help="0: 1 or 2, as the machine's load allows")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="skip torch.compile (slower)")
    return Options(**vars(parser.parse_args()))


def main() -> None:
    options = parse_arguments()
    # The number of threads changes during a run; compiled loops must not be fixed to one.
    torch._inductor.config.cpp.dynamic_threads = True
    train(options, nano_config())


if __name__ == "__main__":
    main()

"""`dsr1 run -p`: one question, one answer."""

import json
import secrets
from dataclasses import replace
from typing import Any

from rich.console import Console

from cli.compiling import show_compiling
from cli.escape import say
from cli.options import RunOptions
from cli.output import AnswerPrinter
from cli.plan import show
from cli.quantize import shown_progress
from hybrid_rt.engine import Engine
from hybrid_rt.generation import Completion, collect
from hybrid_rt.sampling import Sampling
from quant.errors import Dsr1Error


def answer(options: RunOptions, prompt: str, as_json: bool) -> None:
    """Answer `prompt`: streamed to standard output, or as one JSON object."""
    if not prompt.strip():
        raise Dsr1Error("the prompt is empty; give a text with -p or on standard input")
    engine = load_engine(options)
    sampling = choose_sampling(engine, options)
    ids = engine.prompt_ids(conversation(options, prompt), think=options.think)
    steps = engine.generate(ids, sampling)
    if as_json:
        print(json.dumps(as_record(collect(steps), sampling)))
    else:
        AnswerPrinter().show(steps)


def load_engine(options: RunOptions) -> Engine:
    """The engine that the options ask for; what the user should know about it goes to standard error."""
    with shown_progress() as show_progress:
        engine = Engine.load(
            options.model,
            gpu_mem=options.gpu_mem,
            ram=options.ram,
            context=options.context,
            device=options.device,
            threads=options.threads,
            residency=options.residency,
            plan=options.plan,
            pins=options.pin or (),
            verify=options.verify,
            progress=show_progress,
            compiling=show_compiling,
        )
    for note in engine.notes:
        say(note)
    asked = (options.gpu_mem, options.ram, options.residency, options.plan, options.pin)
    if any(asked) or options.device != "auto":
        show(engine.plan, engine.folder.name, Console(stderr=True, highlight=False, markup=False))
    return engine


def choose_sampling(engine: Engine, options: RunOptions) -> Sampling:
    """The model's own sampling, with what the options change; the seed is drawn here so that it can be told."""
    asked: dict[str, Any] = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "think_budget": options.think_budget,
    }
    seed = secrets.randbits(32) if options.seed is None else options.seed
    given = {name: value for name, value in asked.items() if value is not None}
    return replace(engine.default_sampling, seed=seed, **given)


def conversation(options: RunOptions, prompt: str) -> list[dict[str, str]]:
    """The messages of a conversation that begins with `prompt`."""
    system = [{"role": "system", "content": options.system}] if options.system else []
    return [*system, {"role": "user", "content": prompt}]


def as_record(completion: Completion, sampling: Sampling) -> dict[str, object]:
    """What `--json` prints."""
    timings = completion.timings
    return {
        "text": completion.text,
        "reasoning": completion.reasoning,
        "token_ids": completion.token_ids,
        "prompt_tokens": timings.prompt_tokens,
        "finish_reason": completion.finish_reason,
        "prefill_s": timings.prefill_s,
        "decode_s": timings.decode_s,
        "prefill_tok_s": timings.prefill_tok_s,
        "decode_tok_s": timings.decode_tok_s,
        "seed": sampling.seed,
    }

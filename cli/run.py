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
from cli.terminal.answer import AnswerView, stats
from cli.terminal.screen import Screen
from hybrid_rt.engine import Engine
from hybrid_rt.generation import Completion, collect
from hybrid_rt.latent_store import BLOCK, LatentStore
from hybrid_rt.sampling import Sampling
from hybrid_rt.session import Session
from offload.costs import Costs
from offload.sizes import format_size, parse_size
from offload.this_machine import measured_machine
from quant.errors import Dsr1Error


def answer(options: RunOptions, prompt: str, as_json: bool) -> None:
    """Answer `prompt`: streamed to standard output, or as one JSON object."""
    if not prompt.strip():
        raise Dsr1Error("the prompt is empty; give a text with -p or on standard input")
    engine = load_engine(options)
    sampling = choose_sampling(engine, options)
    ids = engine.prompt_ids(conversation(options, prompt), think=options.think)
    session = engine.session()
    store = latent_store(engine, options) if BLOCK <= len(ids) <= engine.context else None
    if store:
        store.restore(session, ids)
    if as_json:
        print(json.dumps(as_record(collect(session.generate(ids, sampling)), sampling)))
    else:
        show_answer(session, ids, sampling)
    if store:
        store.keep(session, len(ids), with_tail=False)  # the end of a prompt that is asked once is not met again
        for note in store.notes:
            say(note)


def show_answer(session: Session, ids: list[int], sampling: Sampling) -> None:
    """Stream an answer to standard output: laid out on a terminal, as plain text elsewhere."""
    screen = Screen()
    if not screen.is_fancy:
        AnswerPrinter().show(session.generate(ids, sampling))
        return
    view = AnswerView(screen)
    last = view.show(session.generate(ids, sampling, view.reading))
    if last is not None:
        screen.line(stats(last.timings, last.finish_reason or "stop", session.engine.context), "dim")


def latent_store(engine: Engine, options: RunOptions) -> LatentStore | None:
    """Where cached tokens are kept, unless the user wants none."""
    return LatentStore(engine, parse_size(options.cache_size)) if options.cache else None


def started(engine: Engine, model: str) -> str:
    """What runs and where, in one line."""
    plan = engine.plan
    sums = [f"RAM {format_size(plan.ram_bytes)} of {format_size(plan.ram_budget)}"]
    if plan.on_gpu:
        sums.insert(0, f"GPU {format_size(plan.gpu_bytes)} of {format_size(plan.gpu_budget)}")
    return f"{model} on {plan.device}: {', '.join(sums)}, context {engine.context:,} tokens{_predicted(engine)}"


def _predicted(engine: Engine) -> str:
    """How fast decoding will be, where the machine was measured (`dsr1 bench`, `dsr1 doctor --measure`)."""
    machine = measured_machine()
    if machine is None or (engine.plan.on_gpu and machine.gpu is None):
        return ""
    return f", {Costs(engine.config, machine).predict(engine.plan).decode_tok_s:,.1f} tokens/s predicted"


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
            defer_experts=options.defer_experts,
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
        "think_at_least": options.think_at_least,
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

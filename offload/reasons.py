"""Why a plan is as it is: a sentence for each choice, which `dsr1 plan --explain` prints."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from offload.costs import WORTH
from offload.deferral import deferral_of
from offload.pins import pinned_chunk, pinned_stream
from offload.plan import SLICE_EXPERTS, Plan, Streaming, is_streamable
from offload.sizes import format_size

if TYPE_CHECKING:
    from offload.planner import Level, Planning


def reasons(planning: "Planning", level: "Level", plan: Plan, tried: Mapping["Level", Plan]) -> Iterator[str]:
    """A sentence for each choice. tried: of each better level the smallest plan, which did not fit."""
    yield _quality_reason(planning, level, tried)
    fastest = planning.prefills[0]
    speed = planning.costs.prefill_tok_s(plan)
    if pinned_chunk(planning.pins) is not None:
        yield f"Prefill goes in chunks of {plan.prefill_chunk} tokens, as --pin says."
    elif plan.prefill_chunk == fastest.chunk and (
        plan.streaming is not None or not fastest.streams or not _in_ram(plan)
    ):
        yield (
            f"Prefill goes in chunks of {plan.prefill_chunk} tokens ({speed:,.0f} tokens/s predicted): larger ones "
            f"would not make it {WORTH - 1:.0%} faster, or are longer than the context."
        )
    else:
        yield (
            f"Prefill goes in chunks of {plan.prefill_chunk} tokens ({speed:,.0f} tokens/s predicted); those of "
            f"{fastest.chunk}{', streamed,' if fastest.streams else ','} which would be faster, need more memory."
        )
    yield from _streaming_reasons(planning, plan)
    yield from _expert_reasons(planning, plan)


def _quality_reason(planning: "Planning", level: "Level", tried: Mapping["Level", Plan]) -> str:
    best = planning.levels()[0]
    if level == best:
        return "Everything that is not a routed expert is as exact as the model has it, because that fits."
    lower = ["the cache (8 bits)"] if level.cache != best.cache else []
    lower += [name.replace("_expert", " experts").replace("dense", "dense layers") for name in level.reduced]
    [*_, before] = [plan for other, plan in tried.items() if other != level]
    short = before.gpu_bytes - before.gpu_budget if before.on_gpu else before.ram_bytes - before.ram_budget
    return (
        f"Smaller forms, the least harmful first: {', '.join(lower)}. With one step less, "
        f"{format_size(max(0, short))} would be missing."
    )


def _streaming_reasons(planning: "Planning", plan: Plan) -> Iterator[str]:
    """Whether long passes send the experts that are in RAM to the GPU, and why."""
    if not plan.on_gpu or not _in_ram(plan):
        return
    tokens, streaming = plan.prefill_chunk, plan.streaming or Streaming(1, SLICE_EXPERTS)
    times = [planning.costs.layer_experts_s(plan, how, tokens) for how in (streaming, None)]
    both = f"streamed, a layer's experts of {tokens} tokens are predicted to take {times[0]:.2f} s, and on the CPU "
    both += f"{times[1]:.2f} s"
    if plan.streaming is not None:
        yield (
            f"From {streaming.from_tokens} tokens a pass on, the GPU computes also the experts that are in RAM, which "
            f"cross PCIe {streaming.slice_experts} at a time: {both}."
        )
    elif pinned_stream(planning.pins) == "off":
        yield f"Experts in RAM are never streamed to the GPU, as --pin says: {both}."
    else:
        wanted = any(prefill.streams for prefill in planning.prefills)
        why = "needs buffers that do not fit" if wanted else "is slower, or not worth the memory"
        yield f"Experts in RAM are not streamed to the GPU for long passes, because that {why}: {both}."


def _in_ram(plan: Plan) -> bool:
    """Whether there are experts in RAM that could be streamed."""
    return any(is_streamable(placement, plan.n_layers) for placement in plan.placements)


def _expert_reasons(planning: "Planning", plan: Plan) -> Iterator[str]:
    if not plan.on_gpu:
        return
    if count := plan.gpu_experts():
        how = (
            "the most used ones of the profile"
            if planning.usage
            else "layer by layer, as no profile tells of their use"
        )
        yield f"{count:,} routed experts fill what is left of the GPU, {how}."
    elif any(part.movable for part in planning.parts.all):
        yield "No routed experts are on the GPU: what is left does not hold one and what it needs to run there."
    if plan.deferred_experts and not any(deferral_of(plan, layer).experts for layer in range(plan.n_layers)):
        yield "No expert is deferred, though asked for: no two layers in a row have experts in RAM."
    elif plan.deferred_experts:
        without = planning.costs.predict(replace(plan, deferred_experts=0)).decode_tok_s
        yield (
            f"In decoding, {plan.deferred_experts} of a token's {planning.config.n_activated_experts} experts join one "
            f"layer later, as asked: {planning.costs.predict(plan).decode_tok_s:,.1f} tokens/s are predicted, and "
            f"{without:,.1f} without. Answers change; docs/quality.md has how much."
        )
    if plan.nodes > 1:
        yield f"Experts are copied, because mapped files cannot be placed on the {plan.nodes} NUMA nodes."

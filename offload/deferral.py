"""Expert deferral: while a token is decoded, a layer's lightest experts join one layer later.

Of a token's K experts in layer l the n with the smallest weights are deferred: they see what the others see, and their
sum is added to the residual stream after layer l + 1, so that the CPU computes them while the GPU runs the attention of
layer l + 1 ("Expert Deferral" of KTransformers, SOSP 2025). This changes numbers; docs/quality.md has how much.

    which    by weight alone; of equal weights the expert with the larger id is deferred
    when     in passes of a single token: prompts, and what the cache keeps of them, are as without
    where    in layers that have experts in RAM and are followed by another one that has: the last one defers nothing.
             Experts on the GPU are never late; one of the n that is there is computed with the others
"""

from dataclasses import dataclass

from offload.plan import DECODED, Plan
from quant.config import ModelConfig
from quant.errors import UsageError


@dataclass(frozen=True)
class Deferral:
    """What one layer does. experts: how many of a token's it defers. joins: whether the layer before defers some."""

    experts: int = 0
    joins: bool = False

    def of(self, tokens: int) -> int:
        """Experts of each token that a pass of so many tokens defers."""
        return self.experts if tokens <= DECODED else 0


NO_DEFERRAL = Deferral()


def deferral_of(plan: Plan, layer: int) -> Deferral:
    """What a plan asks of a layer."""
    hosts = plan.layers_with_host_experts
    if not plan.deferred_experts or layer not in hosts:
        return NO_DEFERRAL
    return Deferral(plan.deferred_experts if layer + 1 in hosts else 0, joins=layer - 1 in hosts)


def choose_deferred(asked: int | None, config: ModelConfig, notes: list[str], on_gpu: bool) -> int:
    """The number of experts to defer, by default none. Raises UsageError unless at least one stays in its layer."""
    deferred, top_k = asked or 0, config.n_activated_experts
    if not 0 <= deferred < top_k:
        raise UsageError(
            f"{deferred} of a token's experts cannot be deferred: this model has {top_k}, and at least one must be "
            f"computed in its own layer; give --defer-experts from 0 to {top_k - 1}"
        )
    if deferred and not on_gpu:
        notes.append("deferred experts make nothing faster without a GPU; here they show what they cost in quality")
    return deferred

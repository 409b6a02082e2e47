"""The model and the engine: attention, router, experts, cache, tokenizer, sampling and generation.

from hybrid_rt import Engine, Sampling
"""

from hybrid_rt.engine import Engine
from hybrid_rt.sampling import Sampling
from hybrid_rt.session import Session

__all__ = ["Engine", "Sampling", "Session"]

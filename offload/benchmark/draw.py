"""Which experts tokens ask for: every expert once before any comes again, so that no cache helps."""

import numpy as np
from numpy.typing import NDArray


class ExpertDraw:
    """Tokens' experts from one permutation of all of them after the other.

    A token never gets an expert twice, nor does a call of several tokens, until it needs more than there are.
    """

    def __init__(self, experts: int, top_k: int, seed: int) -> None:
        if top_k > experts:
            raise ValueError(f"a token needs {top_k} different experts, and there are {experts}")
        self.experts, self.top_k = experts, top_k
        self._rng = np.random.default_rng(seed)
        self._left: list[int] = []

    def draw(self, tokens: int) -> NDArray[np.int64]:
        """The experts of a call: int64 [tokens, top_k]."""
        chosen: list[int] = []
        while missing := tokens * self.top_k - len(chosen):
            if not self._left:
                self._left = self._permutation(chosen)
            chosen += self._left[:missing]
            self._left = self._left[missing:]
        return np.array(chosen, np.int64).reshape(tokens, self.top_k)

    def _permutation(self, chosen: list[int]) -> list[int]:
        """All experts; those come last that this call has, or, if it has had all, those of its unfinished token."""
        recent = chosen if len(chosen) < self.experts else chosen[len(chosen) - len(chosen) % self.top_k :]
        later = set(recent)
        return [expert for expert in self._rng.permutation(self.experts).tolist() if expert not in later] + recent

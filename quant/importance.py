"""How much squared errors in each column of a matrix count when it is encoded: the mean square of its inputs.

The error of an output is the weights' errors times the inputs, so a column whose inputs are large counts more. Where
the numbers come from is for others to know: a text that was run through the model (hybrid_rt/calibration.py), or a
file (quant/imatrix.py).
"""

from typing import Protocol

import torch

from quant.inventory import TensorSpec
from quant.report import ImportanceSummary


class Importance(Protocol):
    """identity: changes with anything that changes the numbers; a journal keeps it."""

    identity: str

    def of(self, spec: TensorSpec) -> torch.Tensor | None:
        """float32 [columns] of a matrix, or None where its columns count alike. May be called by several threads."""

    def summary(self) -> ImportanceSummary | None:
        """What it came from, once all matrices were asked for; None if there was nothing."""


class AllAlike:
    """No importance: every column counts the same (`Importance`)."""

    identity = ""

    def of(self, spec: TensorSpec) -> torch.Tensor | None:
        return None

    def summary(self) -> ImportanceSummary | None:
        return None

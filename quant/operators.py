"""Operators with two bodies: a formula in plain torch, and a CPU kernel that gives the same.

    @with_cpu_kernel("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", kernel)
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return ...

The kernel runs in inference mode on tensors in host memory. In training, on other devices, on fake tensors and where an
emulated GPU counts temporaries the operator is its formula, with the formula's gradients.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("dsr1", "FRAGMENT")


def with_cpu_kernel(schema: str, kernel: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: make a formula the operator `dsr1::` `schema`, for which `kernel` steps in on the CPU."""

    def define(formula: Callable[P, R]) -> Callable[P, R]:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, formula, "CompositeImplicitAutograd")
        _library.impl(name, formula, "AutogradCPU")  # what the line above says, but for there being a CPU kernel
        _library.impl(name, kernel, "CPU")
        return cast(Callable[P, R], getattr(torch.ops.dsr1, name).default)

    return define

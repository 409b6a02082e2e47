"""Muon for matrices (Keller Jordan, 2024): each step is the momentum, made orthogonal."""

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(stack: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrix, roughly, of each of `stack` [N, rows, columns]; singular values end near 1.

    Newton-Schulz on the Gram matrices: with X = Q X0, only Q and X X^T, both of the shorter side, need iterating.
    Wide matrices cost half as much as by iterating X, and small products run better than large thin ones.
    """
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    product = torch.eye(gram.shape[1]).expand_as(gram)
    for _ in range(NEWTON_SCHULZ_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Matrices [..., rows, columns]; those of one shape are stepped together, as one stack."""

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        shapes = sorted({tuple(m.shape[-2:]) for m in matrices})
        groups = [{"params": [m for m in matrices if tuple(m.shape[-2:]) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            stacks = [self._direction(m, group["momentum"]) for m in group["params"]]
            updates = orthogonalize(torch.cat(stacks)).split([len(stack) for stack in stacks])
            rows, columns = stacks[0].shape[1:]
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            for matrix, update in zip(group["params"], updates, strict=True):
                matrix.sub_(update.view_as(matrix), alpha=rate)

    def _direction(self, matrix: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov's momentum as a stack [N, rows, columns]."""
        assert matrix.grad is not None
        buffer = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
        buffer.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(buffer, momentum).view(-1, *matrix.shape[-2:])

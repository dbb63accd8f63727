"""Muon with its orthogonalisation over all matrices of one shape at once, turned where they are tall.

In bfloat16 only where that is faster: torch's own takes one matrix at a time, and multiplies in bfloat16, which
processors without such instructions emulate at a hundredth of their speed.
"""

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from stages.training.host import use_bfloat16


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024, *Muon: An optimizer for hidden layers in neural networks*) up to rounding.

    Settings and states are torch's; momentum is Nesterov's, and a matrix `[rows, columns]` moves by its learning rate
    times sqrt(max(1, rows / columns)).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum, ns_steps=ns_steps)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the matrices once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=_kind)
            if matrices and "bfloat16" not in group:
                group["bfloat16"] = use_bfloat16("auto", matrices[0].device)
            for _, alike in itertools.groupby(matrices, key=_kind):
                self._move(list(alike), group, group["bfloat16"])
        return loss

    def _move(self, matrices: list[nn.Parameter], group: dict, bfloat16: bool) -> None:
        gradients = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        means = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        wanted = torch._foreach_lerp(gradients, means, group["momentum"])
        wide = torch.stack([one.mT if _tall(one) else one for one in wanted])
        moves = orthogonalised(wide, group["ns_coefficients"], group["ns_steps"], group["eps"], bfloat16)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for matrix, move in zip(matrices, moves.to(wide.dtype), strict=True):
            rows, columns = matrix.shape
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            matrix.add_(move.mT if _tall(matrix) else move, alpha=-rate)


def _kind(matrix: torch.Tensor) -> tuple[int, int]:
    return min(matrix.shape), max(matrix.shape)


def _tall(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def orthogonalised(
    x: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, bfloat16: bool
) -> torch.Tensor:
    """Newton-Schulz iterations that bring the singular values of each matrix in `x` near 1.

    `x` is `[N, rows, columns]` with no more rows than columns. One iteration is `x <- (a + b g + c g^2) x` with
    `g = x x^T`; in bfloat16 as torch's own does it.
    """
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    if bfloat16:
        return _step_by_step(x.bfloat16(), coefficients, steps)
    return _by_factors(x, coefficients, steps)


def _step_by_step(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_factors(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """All factors are polynomials of the first `g`: they are multiplied with each other, on the small side of the
    matrices, and with `x` once in the end. bfloat16 is too coarse for this order."""
    a, b, c = coefficients
    gram, product = x @ x.mT, None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return product @ x

"""torch's Muon with Newton-Schulz iterations over all matrices of one shape at once.

torch's own takes one matrix at a time and always multiplies in bfloat16, which processors without such instructions
emulate at a hundredth of their speed. Here bfloat16 is used only where it is faster.
"""

import itertools
import math

import torch
from torch import nn

from stages.training.host import use_bfloat16


class Muon(torch.optim.Muon):
    """Equals torch's Muon (Jordan et al. 2024, *Muon: An optimizer for hidden layers in neural networks*) up to
    rounding, with the same settings and states.

    Momentum is Nesterov's; the learning rate of a matrix `[rows, columns]` has the factor sqrt(max(1, rows / columns)).
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            matrices = sorted((p for p in group["params"] if p.grad is not None), key=_shape)
            if matrices and "bfloat16" not in group:
                group["bfloat16"] = use_bfloat16("auto", matrices[0].device)
            for _, alike in itertools.groupby(matrices, key=_shape):
                self._move(list(alike), group)

    def _move(self, matrices: list[nn.Parameter], group: dict) -> None:
        """Update matrices of one shape; tall ones are transposed."""
        gradients = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        means = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, means, group["momentum"])
        wide = torch.stack([update.mT if _is_tall(update) else update for update in updates])
        settings = group["ns_coefficients"], group["ns_steps"], group["eps"], group["bfloat16"]
        moves = orthogonalize(wide, *settings).to(wide.dtype)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for matrix, move in zip(matrices, moves, strict=True):
            rows, columns = matrix.shape
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            matrix.add_(move.mT if _is_tall(matrix) else move, alpha=-rate)


def _shape(matrix: torch.Tensor) -> tuple[int, int]:
    return min(matrix.shape), max(matrix.shape)


def _is_tall(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def orthogonalize(
    x: torch.Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float, bfloat16: bool
) -> torch.Tensor:
    """Bring the singular values of each matrix in `x` near 1 by Newton-Schulz iterations.

    One iteration is `x <- (a + b g + c g^2) x` with `g = x x^T`.

    Args:
        x: `[N, rows, columns]` with at most as many rows as columns.
    """
    a, b, c = coefficients
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    if bfloat16:
        x = x.bfloat16()
        for _ in range(iterations):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    # All factors are polynomials of the first `g`: multiply them with each other, which are small products, and with
    # `x` once at the end. bfloat16 is too coarse for this order.
    gram, product = x @ x.mT, None
    for iteration in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if iteration + 1 < iterations:
            gram = factor @ gram @ factor
    return product @ x

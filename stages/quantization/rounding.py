"""Weights to integers of 2 to 8 bits: symmetric (zero is zero), one scale for each output channel."""

from dataclasses import dataclass

import torch
from torch import nn

from stages.artifacts.packing import limits
from stages.networks.integer_weights import with_integers
from stages.networks.modules import along_outputs

LEAST_SHARE = {2: 0.2, 3: 0.3, 4: 0.45, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.85}
"""By bits: where the search for the best scale begins, as a share of the one that reaches the largest magnitude."""
SHARES = 9
FINE_SHARES = 4
"""To either side of the best share, down to the next one."""
REFINEMENTS = 2
CHUNK = 2**16
"""Weights that are searched at once: what is between two steps of the search stays in a core's cache."""
DAMPING = 0.01
"""Share of its mean diagonal that is added to GPTQ's Hessian, as in the paper."""
BLOCK = 128
"""Columns of a block of GPTQ, as in the paper."""


@dataclass(frozen=True)
class Rounded:
    """A layer's weight as integers."""

    integers: torch.Tensor
    """int8, of the weight's shape, in [-2^(bits-1), 2^(bits-1) - 1]."""
    scale: torch.Tensor
    """float32 `[out]`."""
    bits: int

    def values(self) -> torch.Tensor:
        """float32: what the integers stand for."""
        return self.integers * along_outputs(self.scale, self.integers)

    def layer(self, layer: nn.Module) -> nn.Module:
        """The integer form of the float layer whose weight this is."""
        return with_integers(layer, self.integers, self.scale, self.bits)


@torch.no_grad()
def round_nearest(weight: torch.Tensor, bits: int) -> Rounded:
    """Round to the nearest integer, each channel with the scale of least squared error.

    Found from a grid of shares of the largest scale and a finer one around the best, and then by turns: with the
    integers fixed, the best scale is the least-squares one, `<w, q> / <q, q>`.

    Args:
        weight: `[out, ...]`, float.
    """
    rows = weight.detach().float().reshape(len(weight), -1)
    scale = torch.cat([_best_scale(some, bits) for some in rows.split(max(1, CHUNK // rows.shape[1]))])
    return Rounded(_steps(rows, scale, bits).to(torch.int8).reshape(weight.shape), scale, bits)


def _best_scale(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 `[R]` for rows `[R, n]`; 1 for a row of zeros."""
    low, high = limits(bits)
    largest = torch.maximum(rows.amax(1).clamp_min(0) / high, (-rows.amin(1)).clamp_min(0) / -low)
    largest = torch.where(largest == 0, 1.0, largest)
    best, best_error = largest, torch.full_like(largest, torch.inf)
    shares = torch.linspace(LEAST_SHARE[bits], 1.0, SHARES).tolist()
    step = (shares[1] - shares[0]) / (FINE_SHARES + 1)
    for share in shares:
        best, best_error = _better(rows, share * largest, bits, best, best_error)
    coarse = best
    for fine in (*range(-FINE_SHARES, 0), *range(1, FINE_SHARES + 1)):
        best, best_error = _better(rows, coarse + fine * step * largest, bits, best, best_error)
    for _ in range(REFINEMENTS):
        steps = _steps(rows, best, bits)
        fitted = torch.linalg.vecdot(rows, steps) / torch.linalg.vecdot(steps, steps).clamp_min(1)
        best, best_error = _better(rows, torch.where(fitted > 0, fitted, best), bits, best, best_error)
    return best


@torch.no_grad()
def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper triangular F with `F^T F` the inverse of the damped Hessian: float64 `[groups, n, n]`.

    What `round_gptq` needs of a layer, whatever the bits. With the order of inputs turned round, the Hessian's own
    Cholesky factor is an upper triangular U with `U U^T` the Hessian, and F is its inverse.

    Args:
        hessian: float32 `[groups, n, n]`, the sum of x x^T over a group's inputs (`calibration.hessians`).
    """
    damped = hessian.double()
    mean = damped.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    eye = torch.eye(hessian.shape[1], dtype=torch.float64, device=hessian.device)
    damped = damped + DAMPING * mean[:, None, None] * eye
    upper = torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


@torch.no_grad()
def round_gptq(weight: torch.Tensor, bits: int, factor: torch.Tensor) -> Rounded:
    """Round column by column, each column's error made up for by those that are still to come (GPTQ, arXiv 2210.17323).

    As in algorithm 1 there, columns beyond a block of `BLOCK` learn of the whole block's errors at once. The scales are
    `round_nearest`'s. Weights that are zero stay zero.

    Args:
        weight: `[out, ...]`, float.
        factor: `inverse_factor` of the layer's Hessian.
    """
    nearest = round_nearest(weight, bits)
    groups, n = factor.shape[:2]
    low, high = limits(bits)
    rows = weight.detach().double().reshape(groups, -1, n).clone()
    zero = rows == 0
    scale = nearest.scale.double().reshape(groups, -1)
    integers = torch.zeros_like(rows)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        errors = torch.empty_like(rows[:, :, start:end])
        for column in range(start, end):
            wanted = rows[:, :, column]
            integer = torch.clamp(torch.round(wanted / scale), low, high).masked_fill_(zero[:, :, column], 0)
            integers[:, :, column] = integer
            error = (wanted - integer * scale) / factor[:, column, column, None]
            rows[:, :, column + 1 : end] -= error[:, :, None] * factor[:, None, column, column + 1 : end]
            errors[:, :, column - start] = error
        rows[:, :, end:] -= errors @ factor[:, start:end, end:]
    return Rounded(integers.to(torch.int8).reshape(weight.shape), nearest.scale, bits)


def _steps(rows: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return (rows / scale[:, None]).round_().clamp_(*limits(bits))


def _better(
    rows: torch.Tensor, scale: torch.Tensor, bits: int, best: torch.Tensor, best_error: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The better of two scales for each row, with its error."""
    error = torch.linalg.vector_norm(_steps(rows, scale, bits).mul_(scale[:, None]).sub_(rows), dim=1)
    better = error < best_error
    return torch.where(better, scale, best), torch.where(better, error, best_error)

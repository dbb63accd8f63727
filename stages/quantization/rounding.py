"""Weights to integers of 2 to 8 bits: symmetric (zero is zero), one scale for each output channel."""

from dataclasses import dataclass

import torch
from torch import nn

from stages.artifacts.packing import limits
from stages.networks.integer_weights import with_integers
from stages.networks.modules import along_outputs

LEAST_FRACTION = {2: 0.2, 3: 0.3, 4: 0.45, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.85}
"""Where the search for the best scale starts, by bits, as a fraction of the scale that covers the largest magnitude."""
COARSE_STEPS = 9
FINE_STEPS = 4
"""Steps to either side of the best coarse fraction, within the distance to the next one."""
REFINEMENTS = 2
CHUNK = 2**16
"""Weights that are searched at once, so that intermediate results stay in a core's cache."""
DAMPING = 0.01
"""Fraction of its mean diagonal that is added to the diagonal of GPTQ's Hessian, as in the paper."""
BLOCK = 128
"""Columns in a block of GPTQ, as in the paper."""


@dataclass(frozen=True)
class Rounded:
    """A layer's weight as integers."""

    integers: torch.Tensor
    """int8 in the weight's shape, from -2^(bits-1) to 2^(bits-1) - 1."""
    scale: torch.Tensor
    """float32 `[out]`."""
    bits: int

    def values(self) -> torch.Tensor:
        """The weights that the integers represent, float32."""
        return self.integers * along_outputs(self.scale, self.integers)

    def layer(self, layer: nn.Module) -> nn.Module:
        """The integer form of the float layer with this weight."""
        return with_integers(layer, self.integers, self.scale, self.bits)


@torch.no_grad()
def round_nearest(weight: torch.Tensor, bits: int) -> Rounded:
    """Round a weight `[out, ...]` to the nearest integers, each channel with the scale of least squared error.

    The search tries a grid of fractions of the largest scale and a finer grid around the best. It then alternates: with
    the integers fixed, the best scale is the least-squares one, `<w, q> / <q, q>`.
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
    fractions = torch.linspace(LEAST_FRACTION[bits], 1.0, COARSE_STEPS).tolist()
    step = (fractions[1] - fractions[0]) / (FINE_STEPS + 1)
    for fraction in fractions:
        best, best_error = _better(rows, fraction * largest, bits, best, best_error)
    coarse = best
    for fine in (*range(-FINE_STEPS, 0), *range(1, FINE_STEPS + 1)):
        best, best_error = _better(rows, coarse + fine * step * largest, bits, best, best_error)
    for _ in range(REFINEMENTS):
        steps = _steps(rows, best, bits)
        fitted = torch.linalg.vecdot(rows, steps) / torch.linalg.vecdot(steps, steps).clamp_min(1)
        best, best_error = _better(rows, torch.where(fitted > 0, fitted, best), bits, best, best_error)
    return best


@torch.no_grad()
def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper triangular F with `F^T F` the inverse of the damped Hessian: float64 `[groups, n, n]`.

    `round_gptq` needs it for any number of bits. With the order of inputs reversed, the Cholesky factor of the Hessian
    is an upper triangular U with `U U^T` the Hessian, and F is the inverse of U.

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
    """Round column by column; the columns still to come compensate each column's error (GPTQ, arXiv 2210.17323).

    As in algorithm 1 there, columns beyond a block of `BLOCK` are updated with the whole block's errors at once. The
    scales are those of `round_nearest`. Weights that are zero stay zero.

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
    """The better of two scales for each row, and its error."""
    error = torch.linalg.vector_norm(_steps(rows, scale, bits).mul_(scale[:, None]).sub_(rows), dim=1)
    better = error < best_error
    return torch.where(better, scale, best), torch.where(better, error, best_error)

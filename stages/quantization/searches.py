"""Searches for the bits of each layer within a budget: at random, and on measured sensitivities.

The controller that learns its choice (`controller`) works on the same `Problem`, with as many evaluations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from stages.common.errors import UserError
from stages.quantization.budget import Budget
from stages.quantization.layers import Layer


@dataclass
class Problem:
    """What a search is given, and a record of what it tried."""

    layers: list[Layer]
    budget: Budget
    errors: np.ndarray
    """float64 `[L, B]`: squared error of each layer's weight at each choice."""
    statistics: np.ndarray
    """float64 `[L, 2]`: of each layer's weights, standard deviation (its logarithm) and kurtosis."""
    evaluate: Callable[[Mapping[str, int | None]], float]
    """The objective (less is better) with so many bits in each named layer; the others stay in float."""
    unquantized: float
    """The objective of the float network."""
    evaluations: int
    """How often `evaluate` may be called."""
    seed: int
    tried: list[float] = field(default_factory=list)
    """The objective of every allocation tried, in order."""
    best: np.ndarray | None = None
    """int64 `[L]`, indices of the budget's choices: the best allocation tried."""

    def try_out(self, allocation: np.ndarray) -> float:
        """Evaluate an allocation, `[L]` indices of the choices, which is within the budget."""
        if self.budget.used(allocation) > self.budget.bits:
            raise ValueError("an allocation beyond the budget was proposed")
        bits = self.budget.choices[allocation]
        value = self.evaluate({layer.name: int(b) for layer, b in zip(self.layers, bits, strict=True)})
        if self.best is None or value < min(self.tried):
            self.best = allocation.copy()
        self.tried.append(value)
        return value


@dataclass(frozen=True)
class Sensitivities:
    """How much the objective rises when one layer alone gets so many bits."""

    rises: np.ndarray
    """float64 `[L, B]`."""
    measured: np.ndarray
    """bool `[B]`: the choices that were measured; the others follow from the squared errors of the weights."""


def measure_sensitivities(problem: Problem, evaluations: int) -> Sensitivities:
    """Measure as many choices for every layer as `evaluations` allow, those nearest to the budget's average first.

    A rise that was not measured is taken to be in proportion to the squared error of the layer's weight, from the
    nearest measured choice.

    Raises:
        UserError: if not even one choice can be measured for every layer.
    """
    layers, choices = problem.layers, problem.budget.choices
    columns = min(evaluations // len(layers), len(choices))
    if columns < 1:
        raise UserError(
            f"evaluations = {problem.evaluations}: the sensitivities of this network's {len(layers)} layers take at"
            f" least {len(layers)}, and trying what comes of them one more: raise it to {len(layers) + 1} or more"
        )
    average = problem.budget.bits / problem.budget.weights.sum()
    measured = np.sort(np.argsort(np.abs(choices - average), kind="stable")[:columns])
    rises = np.full((len(layers), len(choices)), np.nan)
    for row, layer in enumerate(layers):
        single: dict[str, int | None] = {other.name: None for other in layers}
        for column in measured:
            rises[row, column] = problem.evaluate(single | {layer.name: int(choices[column])}) - problem.unquantized
    for column in np.flatnonzero(np.isnan(rises[0])):
        nearest = measured[np.argmin(np.abs(measured - column))]
        share = problem.errors[:, column] / np.maximum(problem.errors[:, nearest], np.finfo(float).tiny)
        rises[:, column] = np.maximum(rises[:, nearest], 0) * share
    return Sensitivities(rises, np.isin(np.arange(len(choices)), measured))


def search_at_random(problem: Problem) -> None:
    """Try allocations drawn at random and projected onto the budget, as many as may be evaluated."""
    generator = np.random.default_rng(problem.seed)
    shape = len(problem.layers), len(problem.budget.choices)
    for _ in range(problem.evaluations):
        drawn = generator.integers(0, shape[1], shape[0])
        problem.try_out(problem.budget.project(drawn, generator.random(shape)))


def search_greedily(problem: Problem) -> Sensitivities:
    """From the most bits everywhere down to the budget: step by step where the least is lost for the bits freed."""
    sensitivities = measure_sensitivities(problem, problem.evaluations - 1)
    most = np.full(len(problem.layers), len(problem.budget.choices) - 1)
    problem.try_out(problem.budget.project(most, -sensitivities.rises))
    return sensitivities


def search_by_integer_programme(problem: Problem) -> Sensitivities:
    """The allocation with the least sum of rises within the budget, exactly (SciPy's `milp`)."""
    sensitivities = measure_sensitivities(problem, problem.evaluations - 1)
    problem.try_out(solve(sensitivities.rises, problem.budget))
    return sensitivities


def solve(rises: np.ndarray, budget: Budget) -> np.ndarray:
    """The allocation of least total rise: int64 `[L]`, indices of the budget's choices.

    Raises:
        UserError: if the solver gives up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, choices = rises.shape
    one_choice = np.kron(np.eye(layers), np.ones(choices))
    bits = np.outer(budget.weights, budget.choices).ravel()
    result = milp(
        rises.ravel(),
        integrality=np.ones(rises.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_choice, 1, 1), LinearConstraint(bits / budget.bits, -np.inf, 1)],
    )
    if result.x is None:
        raise UserError(f"the integer programme found no allocation of bits: {result.message}")
    allocation = result.x.reshape(layers, choices).argmax(1)
    within = budget.used(allocation) <= budget.bits  # the solver allows itself a tolerance
    return allocation if within else budget.project(allocation, -rises)

"""Searches for the bits of each layer within a budget: at random, and on measured sensitivities.

The controller that learns its choice (`controller`) works on the same `Problem`. All have the same evaluations, try
even bits first and end with the best allocation that they tried.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from stages.common.errors import UserError
from stages.quantization.budget import Budget
from stages.quantization.layers import Layer

SPREAD = 1.0
"""Standard deviation of what is drawn for a layer at first, in steps from choice to choice."""
SCALE = 1000.0
"""The largest coefficient that the solver of the integer programme is given."""


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
    param: str = "evaluations"
    """Where `evaluations` stands in params.yaml, for messages."""
    tried: list[float] = field(default_factory=list)
    """The objective of every allocation tried, in order."""
    best: np.ndarray | None = None
    """int64 `[L]`, indices of the budget's choices: the best allocation tried."""

    def try_evenly(self) -> None:
        """Try the allocation that is nearest to equal bits within the budget: the first of each search."""
        budget = self.budget
        lowest = np.flatnonzero(budget.choices * budget.weights.sum() <= budget.bits)[-1]
        self.try_out(budget.project(np.full(len(self.layers), lowest), -self.errors))

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

    A rise that was not measured is taken to be in proportion to the squared error of the layer's weight, as at the
    nearest measured choice; where that was no rise at all, in the least proportion that any layer showed there.

    Raises:
        UserError: if not even one choice can be measured for every layer.
    """
    layers, choices = problem.layers, problem.budget.choices
    columns = min(evaluations // len(layers), len(choices))
    if columns < 1:
        raise UserError(
            f"{problem.param} = {problem.evaluations}: the sensitivities of this network's {len(layers)} layers take at"
            f" least {len(layers)}, and trying even bits and what comes of them two more: raise it to"
            f" {len(layers) + 2} or more"
        )
    nearest_first = np.argsort(np.abs(choices - average_bits(problem.budget)), kind="stable")
    measured = np.sort(nearest_first[:columns])
    rises = np.full((len(layers), len(choices)), np.nan)
    for row, layer in enumerate(layers):
        single: dict[str, int | None] = {other.name: None for other in layers}
        for column in measured:
            rises[row, column] = problem.evaluate(single | {layer.name: int(choices[column])}) - problem.unquantized
    for column in np.flatnonzero(np.isnan(rises[0])):
        nearest = measured[np.argmin(np.abs(measured - column))]
        slopes = rises[:, nearest] / np.maximum(problem.errors[:, nearest], np.finfo(float).tiny)
        least = slopes[slopes > 0].min(initial=np.inf)
        slopes = np.where(slopes > 0, slopes, least if np.isfinite(least) else 0)
        rises[:, column] = slopes * problem.errors[:, column]
    return Sensitivities(rises, np.isin(np.arange(len(choices)), measured))


def search_at_random(problem: Problem) -> None:
    """Try allocations drawn around the budget's average and projected onto it, as many as may be evaluated."""
    generator = np.random.default_rng(problem.seed)
    logits = around(problem.budget, np.full(len(problem.layers), average_bits(problem.budget)))
    problem.try_evenly()
    for _ in range(problem.evaluations - 1):
        values = logits + generator.gumbel(size=logits.shape)
        problem.try_out(problem.budget.project(values.argmax(1), values))


def average_bits(budget: Budget) -> float:
    """Of all weights together, where the whole budget is used."""
    return budget.bits / float(budget.weights.sum())


def around(budget: Budget, centres: np.ndarray, spread: float = SPREAD) -> np.ndarray:
    """Logits of a normal distribution over the choices of each layer: float64 `[L, B]`.

    Args:
        centres: float64 `[L]`, in bits.
        spread: the standard deviation, in mean steps from choice to choice.
    """
    step = np.ptp(budget.choices) / (len(budget.choices) - 1)
    return -np.square((budget.choices - centres[:, None]) / (spread * step)) / 2


def search_greedily(problem: Problem) -> Sensitivities:
    """From the most bits everywhere down to the budget: step by step where the least is lost for the bits freed."""
    most = np.full(len(problem.layers), len(problem.budget.choices) - 1)
    return _search_on_sensitivities(problem, lambda rises: problem.budget.project(most, -rises))


def search_by_ilp(problem: Problem) -> Sensitivities:
    """The allocation with the least sum of rises within the budget, exactly (SciPy's `milp`)."""
    return _search_on_sensitivities(problem, lambda rises: solve(rises, problem.budget))


def _search_on_sensitivities(problem: Problem, propose: Callable[[np.ndarray], np.ndarray]) -> Sensitivities:
    """Try what follows from the rises; the evaluations that are left go into single moves away from the best."""
    problem.try_evenly()
    sensitivities = measure_sensitivities(problem, problem.evaluations - 2)
    problem.try_out(propose(sensitivities.rises))
    spent = len(problem.tried) + int(sensitivities.measured.sum()) * len(problem.layers)
    _improve(problem, sensitivities.rises, problem.evaluations - spent)
    return sensitivities


def _improve(problem: Problem, rises: np.ndarray, evaluations: int) -> None:
    """Try neighbours of the best allocation, in random order, each only once, and go on from every better one.

    A neighbour has a bit choice more or less in one layer; the others are projected onto the budget by their rises.
    """
    generator = np.random.default_rng(problem.seed)
    seen = {tuple(problem.best)}
    while evaluations > 0:
        for neighbour in _neighbours(problem, rises, generator):
            if tuple(neighbour) in seen:
                continue
            seen.add(tuple(neighbour))
            evaluations -= 1
            better = problem.try_out(neighbour) == min(problem.tried)
            if better or not evaluations:
                break
        else:
            return


def _neighbours(problem: Problem, rises: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    budget, best = problem.budget, problem.best
    moves = [(layer, step) for layer in range(len(best)) for step in (-1, 1)]
    for layer, step in generator.permutation(moves):
        choice = best[layer] + step
        least = np.zeros(len(best), int)
        least[layer] = choice
        if not 0 <= choice < len(budget.choices) or budget.used(least) > budget.bits:
            continue
        moved, values = best.copy(), -rises
        moved[layer] = choice
        values[layer, np.arange(len(budget.choices)) != choice] = -np.inf  # the others make room, or take it
        yield budget.project(moved, values)


def solve(rises: np.ndarray, budget: Budget) -> np.ndarray:
    """The allocation of least total rise: int64 `[L]`, indices of the budget's choices.

    Raises:
        UserError: if the solver gives up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, choices = rises.shape
    largest = np.abs(rises).max()
    scaled = rises / largest if largest > 0 else rises  # the solver's tolerances are absolute
    one_choice = np.kron(np.eye(layers), np.ones(choices))
    bits = np.outer(budget.weights, budget.choices).ravel()
    result = milp(
        SCALE * scaled.ravel(),
        integrality=np.ones(rises.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_choice, 1, 1), LinearConstraint(bits / budget.bits, -np.inf, 1)],
        options={"mip_rel_gap": 0},
    )
    if result.x is None:
        raise UserError(f"the integer programme found no allocation of bits: {result.message}")
    allocation = result.x.reshape(layers, choices).argmax(1)
    within = budget.used(allocation) <= budget.bits  # the solver allows itself a tolerance
    return allocation if within else budget.project(allocation, -rises)

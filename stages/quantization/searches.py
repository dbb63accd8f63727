"""Searches for the bits of each layer within a budget: random, greedy, and by an integer linear program (ILP).

The controller that learns its choice (`controller`) solves the same `Problem`. All searches have the same number of
evaluations, try even bits first, and end with the best allocation that they tried.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from stages.common.errors import UserError
from stages.params.quantizers import AllocatedBits
from stages.quantization.layers import Layer

STD = 1.0
"""Standard deviation of random draws around the average, in steps between choices."""
SCALE = 1000.0
"""Largest coefficient of the integer linear program."""


@dataclass(frozen=True)
class BitBudget:
    """Bits of L layers within a total. Allocations are int64 `[L]` indices of `choices`."""

    weights: np.ndarray
    """int64 `[L]`: number of weights of each layer."""
    choices: np.ndarray
    """int64 `[B]`, rising: the bits that a layer may have."""
    bits: int
    """Largest total of the bits of all weights."""

    @classmethod
    def of(cls, layers: list[Layer], quantizer: AllocatedBits) -> "BitBudget":
        weights = np.array([layer.weights for layer in layers])
        return cls(weights, np.array(quantizer.choices), int(quantizer.average_bits * weights.sum()))

    def used(self, allocation: np.ndarray) -> int:
        """Total bits of an allocation."""
        return int(self.weights @ self.choices[allocation])

    def project(self, allocation: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Lower an allocation until it is within the budget, then raise it as far as the budget allows.

        Each move is the one that costs least, or gains most, for the bits that it frees or takes.

        Args:
            values: float64 `[L, B]`: value of each choice of each layer (log-probability, or negative loss). No layer
                moves to a choice of value -inf.
        """
        allocation = allocation.copy()
        rows = np.arange(len(allocation))
        while (used := self.used(allocation)) > self.bits:
            lower = np.maximum(allocation - 1, 0)
            freed = self.weights * (self.choices[allocation] - self.choices[lower])
            cost = np.where(freed > 0, values[rows, allocation] - values[rows, lower], np.inf) / np.maximum(freed, 1)
            allocation[np.argmin(cost)] -= 1
        while True:
            higher = np.minimum(allocation + 1, len(self.choices) - 1)
            taken = self.weights * (self.choices[higher] - self.choices[allocation])
            fits = (taken > 0) & (used + taken <= self.bits)
            gain = np.where(fits, values[rows, higher] - values[rows, allocation], -np.inf) / np.maximum(taken, 1)
            best = int(np.argmax(gain))
            if gain[best] == -np.inf:
                return allocation
            allocation[best] += 1
            used += int(taken[best])


@dataclass
class Problem:
    """The problem that a search solves, and the record of what it tried."""

    layers: list[Layer]
    budget: BitBudget
    errors: np.ndarray
    """float64 `[L, B]`: squared error of each layer's weight at each choice."""
    statistics: np.ndarray
    """float64 `[L, 2]`: logarithm of the standard deviation, and kurtosis, of each layer's weights."""
    evaluate: Callable[[Mapping[str, int | None]], float]
    """The loss on calibration images with these bits in each named layer; None stands for float."""
    unquantized: float
    """The loss of the float network."""
    evaluations: int
    """Number of calls of `evaluate` that the search may make."""
    seed: int
    param: str = "evaluations"
    """The place of `evaluations` in params.yaml, for messages."""
    tried: list[float] = field(default_factory=list)
    """The loss of every allocation tried, in order."""
    best: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 `[L]`, indices of the budget's choices: the best allocation tried."""

    def try_evenly(self) -> None:
        """Try the allocation within the budget that is nearest to equal bits, as every search does first."""
        budget = self.budget
        lowest = np.flatnonzero(budget.choices * budget.weights.sum() <= budget.bits)[-1]
        self.try_out(budget.project(np.full(len(self.layers), lowest), -self.errors))

    def try_out(self, allocation: np.ndarray) -> float:
        """Evaluate an allocation within the budget, given as int64 `[L]` indices of the choices."""
        if self.budget.used(allocation) > self.budget.bits:
            raise ValueError("a search proposed an allocation beyond the budget")
        bits = self.budget.choices[allocation]
        value = self.evaluate({layer.name: int(b) for layer, b in zip(self.layers, bits, strict=True)})
        if not self.tried or value < min(self.tried):
            self.best = allocation.copy()
        self.tried.append(value)
        return value


@dataclass(frozen=True)
class Sensitivities:
    """The rise of the loss when a single layer has integers."""

    rises: np.ndarray
    """float64 `[L, B]`."""
    measured: np.ndarray
    """bool `[B]`: the measured choices; the others are derived from the squared errors of the weights."""


def measure_sensitivities(problem: Problem, evaluations: int) -> Sensitivities:
    """Measure as many choices for every layer as `evaluations` allow, those nearest to the budget's average first.

    Other rises are derived from the nearest measured choice, in proportion to the squared error of the layer's weight.
    If the loss did not rise there, the least proportion among all layers is used.

    Raises:
        UserError: If not even one choice can be measured for every layer.
    """
    layers, choices = problem.layers, problem.budget.choices
    columns = min(evaluations // len(layers), len(choices))
    if columns < 1:
        raise UserError(
            f"{problem.param} = {problem.evaluations}: the sensitivities of this network's {len(layers)} layers take at"
            f" least {len(layers)}, and trying even bits and the result two more: raise it to {len(layers) + 2} or more"
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
    """Try allocations drawn around the budget's average and projected onto the budget."""
    generator = np.random.default_rng(problem.seed)
    logits = around(problem.budget, np.full(len(problem.layers), average_bits(problem.budget)))
    problem.try_evenly()
    for _ in range(problem.evaluations - 1):
        values = logits + generator.gumbel(size=logits.shape)
        problem.try_out(problem.budget.project(values.argmax(1), values))


def average_bits(budget: BitBudget) -> float:
    """Bits per weight if the whole budget is used."""
    return budget.bits / float(budget.weights.sum())


def around(budget: BitBudget, centers: np.ndarray, std: float = STD) -> np.ndarray:
    """Logits of a normal distribution over the choices of each layer: float64 `[L, B]`.

    Args:
        centers: float64 `[L]`, in bits.
        std: In mean steps between choices.
    """
    step = np.ptp(budget.choices) / (len(budget.choices) - 1)
    return -np.square((budget.choices - centers[:, None]) / (std * step)) / 2


def search_greedily(problem: Problem) -> Sensitivities:
    """Reduce the most bits everywhere to the budget, step by step, where the loss rises least for the bits freed."""
    most = np.full(len(problem.layers), len(problem.budget.choices) - 1)
    return _search_on_sensitivities(problem, lambda rises: problem.budget.project(most, -rises))


def search_by_ilp(problem: Problem) -> Sensitivities:
    """Find the allocation with the least sum of rises within the budget, exactly, by an integer linear program."""
    return _search_on_sensitivities(problem, lambda rises: solve(rises, problem.budget))


def _search_on_sensitivities(problem: Problem, propose: Callable[[np.ndarray], np.ndarray]) -> Sensitivities:
    """Try the proposal for the measured rises; use the evaluations that are left for single moves from the best."""
    problem.try_evenly()
    sensitivities = measure_sensitivities(problem, problem.evaluations - 2)
    problem.try_out(propose(sensitivities.rises))
    spent = len(problem.tried) + int(sensitivities.measured.sum()) * len(problem.layers)
    _improve(problem, sensitivities.rises, problem.evaluations - spent)
    return sensitivities


def _improve(problem: Problem, rises: np.ndarray, evaluations: int) -> None:
    """Try neighbors of the best allocation in random order, each only once, and continue from every better one.

    A neighbor has the next higher or lower choice in one layer; the others are projected onto the budget by rises.
    """
    generator = np.random.default_rng(problem.seed)
    seen = {tuple(problem.best)}
    while evaluations > 0:
        for neighbor in _neighbors(problem, rises, generator):
            if tuple(neighbor) in seen:
                continue
            seen.add(tuple(neighbor))
            evaluations -= 1
            better = problem.try_out(neighbor) == min(problem.tried)
            if better or not evaluations:
                break
        else:
            return


def _neighbors(problem: Problem, rises: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
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
        values[layer, np.arange(len(budget.choices)) != choice] = -np.inf  # only the others move
        yield budget.project(moved, values)


def solve(rises: np.ndarray, budget: BitBudget) -> np.ndarray:
    """Solve the integer linear program: the allocation of least total rise, int64 `[L]`, indices of the choices.

    Raises:
        UserError: If the solver finds no solution.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # here, since it is slow to import

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
        raise UserError(f"the integer linear program found no allocation of bits: {result.message}")
    allocation = result.x.reshape(layers, choices).argmax(1)
    within = budget.used(allocation) <= budget.bits  # the solver allows itself a tolerance
    return allocation if within else budget.project(allocation, -rises)

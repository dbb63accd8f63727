import itertools

import numpy as np
import pytest
from toys import toy_problem

from stages.common.errors import UserError
from stages.quantization.searches import (
    BitBudget,
    measure_sensitivities,
    search_at_random,
    search_by_ilp,
    search_greedily,
    solve,
)

WEIGHTS, HARM = [40, 10, 25, 5, 60, 30], [9.0, 100.0, 1.0, 400.0, 3.0, 30.0]
SEARCHES = [search_at_random, search_greedily, search_by_ilp]


def budget_of(*weights: int, average: float = 4.0) -> BitBudget:
    return BitBudget(np.array(weights), np.arange(2, 9), int(average * sum(weights)))


def test_no_projected_allocation_exceeds_the_budget_and_none_leaves_room():
    generator = np.random.default_rng(0)
    for _ in range(200):
        count = int(generator.integers(1, 9))
        budget = budget_of(*generator.integers(1, 1000, count), average=generator.uniform(2, 8))
        values = generator.normal(size=(count, 7))
        allocation = budget.project(generator.integers(0, 7, count), values)
        room = budget.bits - budget.used(allocation)
        assert room >= 0
        assert all(weight > room for weight, choice in zip(budget.weights, allocation, strict=True) if choice < 6)


RISING = np.arange(7.0)


@pytest.mark.parametrize(
    ("weights", "average", "start", "values", "expected"),
    [
        ((10, 10, 20), 4, [0, 4, 2], np.zeros((3, 7)), [0, 4, 2]),  # it fills the budget and stays
        ((10, 10), 5, [6, 6], np.stack([RISING, 0 * RISING]), [6, 0]),  # only the first layer wants bits
        ((100, 1), 6, [6, 6], np.stack([RISING, RISING]), [3, 6]),  # a large layer loses as little for more bits
        ((7, 3), 2, [3, 5], np.zeros((2, 7)), [0, 0]),  # the least budget leaves no choice
        ((7, 3), 8, [3, 5], np.zeros((2, 7)), [6, 6]),  # nor does the largest
    ],
)
def test_a_projection_moves_where_the_least_is_lost_for_the_bits(weights, average, start, values, expected):
    assert budget_of(*weights, average=average).project(np.array(start), values).tolist() == expected


def best_by_brute_force(rises: np.ndarray, problem) -> float:
    allocations = itertools.product(range(rises.shape[1]), repeat=len(rises))
    within = (np.array(a) for a in allocations if problem.budget.used(np.array(a)) <= problem.budget.bits)
    return min(rises[np.arange(len(rises)), a].sum() for a in within)


@pytest.mark.parametrize("seed", range(5))
def test_the_ilp_is_as_good_as_trying_everything(seed):
    generator = np.random.default_rng(seed)
    problem = toy_problem(generator.integers(1, 500, 6).tolist(), [1.0] * 6, (2, 3, 5, 8), generator.uniform(2, 8))
    rises = generator.normal(size=(6, 4))
    allocation = solve(rises, problem.budget)
    assert problem.budget.used(allocation) <= problem.budget.bits
    assert rises[np.arange(6), allocation].sum() == pytest.approx(best_by_brute_force(rises, problem), abs=1e-9)


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e7])
def test_the_ilp_is_exact_whatever_the_size_of_the_rises(size):
    generator = np.random.default_rng(0)
    weights = generator.integers(100, 5000, 35).tolist()
    problem = toy_problem(weights, np.exp(generator.normal(0, 1.5, 35)).tolist(), tuple(range(2, 9)), 3.7)
    rows = np.arange(35)
    best = problem.errors[rows, solve(problem.errors, problem.budget)].sum()
    assert problem.errors[rows, solve(size * problem.errors, problem.budget)].sum() == pytest.approx(best, rel=1e-6)


def test_on_losses_that_add_up_the_ilp_is_best_and_greedy_near_it():
    greedy, exact = toy_problem(WEIGHTS, HARM), toy_problem(WEIGHTS, HARM)
    search_greedily(greedy)
    search_by_ilp(exact)
    assert exact.tried[1] - 1 == pytest.approx(best_by_brute_force(exact.errors, exact))
    uniform = greedy.evaluate({layer.name: 4 for layer in greedy.layers})
    assert min(exact.tried) <= min(greedy.tried) < 1 + 0.5 * (uniform - 1)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("evaluations", [8, 13, 20, 26])
def test_every_search_uses_its_evaluations_and_no_more_bits_than_it_may(search, evaluations):
    problem = toy_problem(WEIGHTS, HARM, evaluations=evaluations)
    calls, evaluate = [], problem.evaluate
    problem.evaluate = lambda bits: calls.append(bits) or evaluate(bits)
    search(problem)
    assert len(calls) == evaluations
    assert problem.budget.used(problem.best) <= problem.budget.bits


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_tries_even_bits_first_and_ends_with_the_best_that_it_tried(search):
    problem = toy_problem(WEIGHTS, [1.0] * 6, evaluations=8)
    search(problem)
    assert problem.tried[0] == problem.evaluate({layer.name: 4 for layer in problem.layers})
    best = {f"layer{i}": int(problem.budget.choices[c]) for i, c in enumerate(problem.best)}
    assert problem.evaluate(best) == min(problem.tried)


@pytest.mark.parametrize("search", [search_greedily, search_by_ilp])
def test_evaluations_that_are_left_mend_what_single_layers_could_not_tell(search):
    """A layer is ruinous at few bits only together with others: rises mislead the search, and neighbors mend that."""

    def problem_of(evaluations):
        problem = toy_problem([50] * 6, HARM, (2, 3, 4, 5, 6), evaluations=evaluations)
        together = problem.evaluate
        problem.evaluate = lambda bits: together(bits) + 0.1 * (bits["layer2"] == 2 and None not in bits.values())
        return problem

    without, with_some = problem_of(32), problem_of(60)  # 6 layers at 5 choices, even bits and the proposal: 32
    search(without)
    search(with_some)
    assert without.tried == with_some.tried[:2]
    assert min(with_some.tried) < min(without.tried)


def test_a_neighbor_that_no_budget_allows_is_left_out():
    problem = toy_problem([1000, 1, 1], [1.0, 5.0, 1.0], evaluations=60)  # layer 0 can never have 8 bits
    search_greedily(problem)
    assert len(problem.tried) < 60 - 9
    assert problem.budget.used(problem.best) <= problem.budget.bits


def test_random_search_tries_others_under_another_seed():
    one, other = (toy_problem(WEIGHTS, HARM, evaluations=30, seed=seed) for seed in (0, 1))
    search_at_random(one)
    search_at_random(other)
    assert len(one.tried) == 30
    assert one.tried != other.tried


def test_rises_that_are_not_measured_follow_from_the_errors():
    found = measure_sensitivities(toy_problem(WEIGHTS, HARM, evaluations=13), 12)
    assert found.measured.tolist() == [True, True, False]  # nearest to the average of 4 bits, the fewer first
    assert np.allclose(found.rises, toy_problem(WEIGHTS, HARM).errors)


def test_a_layer_that_seemed_to_help_is_not_taken_for_free_at_other_bits():
    problem = toy_problem(WEIGHTS, HARM, evaluations=8)
    alone = problem.evaluate
    problem.evaluate = lambda bits: alone(bits) - 2 * (bits["layer2"] == 4)
    found = measure_sensitivities(problem, 6)
    assert found.rises[2, 1] < 0
    assert np.allclose(np.delete(found.rises, 2, 0), np.delete(problem.errors, 2, 0))
    assert np.allclose(found.rises[2, [0, 2]], problem.errors[2, [0, 2]])  # here every layer has the same proportion


def test_too_few_evaluations_are_refused_with_the_least_that_will_do():
    with pytest.raises(UserError, match=r"evaluations = 7: .* 6 layers .* raise it to 8"):
        search_greedily(toy_problem(WEIGHTS, HARM, evaluations=7))


def test_an_allocation_beyond_the_budget_is_never_evaluated():
    problem = toy_problem(WEIGHTS, HARM)
    with pytest.raises(ValueError, match="beyond the budget"):
        problem.try_out(np.full(6, 2))
    assert problem.tried == []

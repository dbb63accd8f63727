import itertools

import numpy as np
import pytest
from toy_problem import toy_problem

from stages.common.errors import UserError
from stages.quantization.searches import (
    measure_sensitivities,
    search_at_random,
    search_by_integer_programme,
    search_greedily,
    solve,
)

WEIGHTS, HARM = [40, 10, 25, 5, 60, 30], [9.0, 100.0, 1.0, 400.0, 3.0, 30.0]


def best_by_brute_force(rises: np.ndarray, problem) -> float:
    allocations = itertools.product(range(rises.shape[1]), repeat=len(rises))
    within = (np.array(a) for a in allocations if problem.budget.used(np.array(a)) <= problem.budget.bits)
    return min(rises[np.arange(len(rises)), a].sum() for a in within)


@pytest.mark.parametrize("seed", range(5))
def test_the_integer_programme_is_as_good_as_trying_everything(seed):
    generator = np.random.default_rng(seed)
    problem = toy_problem(generator.integers(1, 500, 6).tolist(), [1.0] * 6, (2, 3, 5, 8), generator.uniform(2, 8))
    rises = generator.normal(size=(6, 4))
    allocation = solve(rises, problem.budget)
    assert problem.budget.used(allocation) <= problem.budget.bits
    assert rises[np.arange(6), allocation].sum() == pytest.approx(best_by_brute_force(rises, problem), abs=1e-9)


def test_on_losses_that_add_up_the_integer_programme_finds_the_best_of_all():
    problem = toy_problem(WEIGHTS, HARM)
    search_by_integer_programme(problem)
    assert problem.tried[0] - 1 == pytest.approx(best_by_brute_force(problem.errors, problem))


def test_greedy_is_near_the_integer_programme_and_far_better_than_uniform():
    greedy, exact = toy_problem(WEIGHTS, HARM), toy_problem(WEIGHTS, HARM)
    search_greedily(greedy)
    search_by_integer_programme(exact)
    uniform = greedy.evaluate({layer.name: 4 for layer in greedy.layers})
    assert min(exact.tried) <= min(greedy.tried) < 1 + 0.5 * (uniform - 1)


@pytest.mark.parametrize("search", [search_at_random, search_greedily, search_by_integer_programme])
def test_no_search_evaluates_more_often_or_spends_more_bits_than_it_may(search):
    problem = toy_problem(WEIGHTS, HARM, evaluations=20)
    calls, evaluate = [], problem.evaluate
    problem.evaluate = lambda bits: calls.append(bits) or evaluate(bits)
    search(problem)
    assert len(calls) <= 20
    assert problem.budget.used(problem.best) <= problem.budget.bits


def test_random_search_keeps_the_best_and_another_seed_tries_others():
    one, other = toy_problem(WEIGHTS, HARM, evaluations=30), toy_problem(WEIGHTS, HARM, evaluations=30)
    other.seed = 1
    search_at_random(one)
    search_at_random(other)
    assert len(one.tried) == 30
    bits = {layer.name: int(b) for layer, b in zip(one.layers, one.budget.choices[one.best], strict=True)}
    assert one.evaluate(bits) == min(one.tried)
    assert one.tried != other.tried


def test_with_few_evaluations_the_rises_that_are_not_measured_follow_from_the_errors():
    problem = toy_problem(WEIGHTS, HARM, evaluations=13)
    found = measure_sensitivities(problem, 12)
    assert found.measured.tolist() == [True, True, False]  # nearest to the average of 4 bits, the fewer first
    assert np.allclose(found.rises, problem.errors)


def test_too_few_evaluations_are_refused_with_the_least_that_will_do():
    with pytest.raises(UserError, match=r"evaluations = 6: .* 6 layers .* raise it to 7"):
        search_greedily(toy_problem(WEIGHTS, HARM, evaluations=6))


def test_an_allocation_beyond_the_budget_is_never_evaluated():
    problem = toy_problem(WEIGHTS, HARM)
    with pytest.raises(ValueError, match="beyond the budget"):
        problem.try_out(np.full(6, 2))
    assert problem.tried == []

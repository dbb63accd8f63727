import numpy as np
import pytest

from stages.quantization.budget import Budget

CHOICES = np.arange(2, 9)


def budget_of(*weights: int, average: float = 4.0) -> Budget:
    return Budget(np.array(weights), CHOICES, int(average * sum(weights)))


def test_no_projected_allocation_exceeds_the_budget_and_none_leaves_room():
    generator = np.random.default_rng(0)
    for _ in range(200):
        count = int(generator.integers(1, 9))
        budget = budget_of(*generator.integers(1, 1000, count), average=generator.uniform(2, 8))
        values = generator.normal(size=(count, 7))
        allocation = budget.project(generator.integers(0, 7, count), values)
        assert budget.used(allocation) <= budget.bits
        room = budget.bits - budget.used(allocation)
        assert all(weight > room for weight, choice in zip(budget.weights, allocation, strict=True) if choice < 6)


def test_an_allocation_that_fills_the_budget_stays():
    budget = budget_of(10, 10, 20)
    allocation = np.array([0, 4, 2])
    assert budget.used(allocation) == budget.bits
    assert np.array_equal(budget.project(allocation, np.zeros((3, 7))), allocation)


def test_bits_are_taken_where_the_least_is_lost_for_them():
    budget = budget_of(10, 10, average=5)
    values = np.zeros((2, 7))
    values[0] = np.arange(7)  # the first layer wants bits, the second does not mind
    assert budget.project(np.array([6, 6]), values).tolist() == [6, 0]


def test_a_cheap_loss_on_a_large_layer_goes_before_a_small_one():
    budget = budget_of(100, 1, average=6)
    values = np.tile(np.arange(7.0), (2, 1))
    assert budget.project(np.array([6, 6]), values)[1] == 6


@pytest.mark.parametrize(("average", "expected"), [(2, 0), (8, 6)])
def test_the_least_and_the_largest_budget_leave_no_choice(average, expected):
    budget = budget_of(7, 3, average=average)
    assert budget.project(np.array([3, 5]), np.zeros((2, 7))).tolist() == [expected, expected]

import numpy as np
import pytest
import torch
from toy_problem import many_layers, toy_problem

from stages.common.params import LearnedBits
from stages.quantization.controller import Controller, learn_bits
from stages.quantization.searches import search_at_random, search_by_integer_programme

WEIGHTS, HARM = [40, 10, 25, 5, 60, 30, 20, 15], [9.0, 100.0, 1.0, 400.0, 3.0, 30.0, 0.1, 50.0]
SETTINGS = LearnedBits(method="learned_bits", average_bits=4, choices=[2, 4, 8])


@pytest.mark.parametrize("seed", range(2))
def test_what_it_tries_becomes_better_than_uniform_bits_and_chance(seed):
    learned, drawn, exact = (many_layers(seed) for _ in range(3))
    learn_bits(learned, SETTINGS)
    search_at_random(drawn)
    search_by_integer_programme(exact)
    uniform = exact.evaluate({layer.name: 4 for layer in exact.layers})
    assert np.mean(learned.tried[-50:]) - 1 < 0.5 * (np.mean(learned.tried[:50]) - 1)
    assert min(exact.tried) <= min(learned.tried) < min(uniform, *drawn.tried)


@pytest.mark.parametrize("evaluations", [5, 15, 16, 100])
def test_every_evaluation_is_used_and_none_beyond(evaluations):
    problem = toy_problem(WEIGHTS, HARM, evaluations=evaluations)
    calls, evaluate = [], problem.evaluate
    problem.evaluate = lambda bits: calls.append(bits) or evaluate(bits)
    sensitivities = learn_bits(problem, SETTINGS)
    assert len(calls) == evaluations
    assert (sensitivities is not None) == (evaluations >= 16)  # one of each of the 8 layers leaves as many to learn
    assert problem.budget.used(problem.best) <= problem.budget.bits


def test_the_same_seed_tries_the_same_and_another_one_others():
    def tried(seed: int) -> list[float]:
        problem = toy_problem(WEIGHTS, HARM, evaluations=60)
        problem.seed = seed
        learn_bits(problem, SETTINGS)
        return problem.tried

    state = torch.get_rng_state()
    assert tried(0) == tried(0) != tried(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fresh_controller_draws_from_the_prior_in_every_layer():
    torch.manual_seed(0)
    controller = Controller(torch.randn(5, 3), torch.tensor([0.0, 1.0, -1.0]), hidden_units=8)
    allocation, log_probability, entropy, values = controller(4000, torch.Generator().manual_seed(0))
    prior = torch.log_softmax(controller.prior, 0)
    assert torch.allclose(log_probability, prior[allocation].sum(1), atol=1e-5)
    assert torch.allclose(entropy, -(prior.exp() * prior).sum().expand(4000), atol=1e-5)
    assert torch.equal(values.argmax(2), allocation)
    shares = torch.stack([(allocation == choice).float().mean(0) for choice in range(3)], 1)
    assert torch.allclose(shares, prior.exp().expand(5, 3), atol=0.03)


def test_the_policy_gradient_is_that_of_the_expected_reward():
    """One layer, two choices: against the derivative of p(b) r(b), summed exactly."""
    controller = Controller(torch.ones(1, 2), torch.zeros(2), hidden_units=4)
    rewards = torch.tensor([1.0, 3.0])
    allocation, log_probability, _, _ = controller(20_000, torch.Generator().manual_seed(0))
    estimate = torch.autograd.grad((rewards[allocation[:, 0]] * log_probability).mean(), controller.head.bias)[0]
    assert torch.allclose(estimate, torch.tensor([-0.5, 0.5]), atol=0.03)

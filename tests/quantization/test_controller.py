import numpy as np
import pytest
import torch
from toys import many_layers, toy_problem

from stages.params.quantizers import LearnedBits
from stages.quantization.controller import Controller, learn_bits
from stages.quantization.searches import search_at_random, search_by_ilp

WEIGHTS, HARM = [40, 10, 25, 5, 60, 30, 20, 15], [9.0, 100.0, 1.0, 400.0, 3.0, 30.0, 0.1, 50.0]
SETTINGS = LearnedBits(method="learned_bits", average_bits=4, choices=[2, 4, 8])


@pytest.mark.parametrize("seed", range(2))
def test_learned_bits_are_better_than_even_and_random_ones_and_no_better_than_exact_ones(seed):
    learned, drawn, exact = (many_layers(seed) for _ in range(3))
    learn_bits(learned, SETTINGS)
    search_at_random(drawn)
    search_by_ilp(exact)
    even = exact.evaluate({layer.name: 4 for layer in exact.layers})
    assert min(exact.tried) <= min(learned.tried) + 1e-12 < min(even, *drawn.tried)


@pytest.mark.parametrize("seed", range(3))
def test_draws_improve_over_those_of_a_fixed_policy_where_sensitivities_say_nothing(seed):
    learned, untrained = (
        uninformative(toy_problem(WEIGHTS, HARM, (2, 3, 4, 5, 6, 7, 8), evaluations=600, seed=seed)) for _ in range(2)
    )
    learn_bits(learned, SETTINGS.model_copy(update={"learning_rate": 0.05}))
    learn_bits(untrained, SETTINGS.model_copy(update={"learning_rate": 0.0}))
    assert learned.tried[:10] == untrained.tried[:10]  # even bits, the most probable, and the first eight draws
    assert np.mean(learned.tried[-100:]) - 1 < 0.7 * (np.mean(untrained.tried[-100:]) - 1)


def test_the_policy_starts_at_the_ilp_of_the_sensitivities():
    problem = many_layers(0)
    learn_bits(problem, SETTINGS.model_copy(update={"learning_rate": 0.0}))
    exact = many_layers(0)
    search_by_ilp(exact)
    assert (
        problem.tried[1] == problem.tried[-1] == pytest.approx(exact.tried[1])
    )  # the most probable, as the policy never moved
    assert np.mean(problem.tried[1:]) < problem.tried[0]  # its draws are better than even bits


def test_without_noise_each_layer_gets_its_most_probable_choice():
    controller = Controller(torch.randn(4, 3), torch.randn(4, 5), hidden_units=8)
    allocation, _, _, values = controller(1, None)
    assert torch.equal(allocation[0], controller.prior.argmax(1))
    assert torch.allclose(values[0], controller.prior.log_softmax(1))


def test_the_entropy_bonus_keeps_the_policy_wide():
    narrow, wide = (
        record_entropies(many_layers(0), SETTINGS.model_copy(update={"entropy_weight": weight}))
        for weight in (0.0, 1.0)
    )
    assert narrow[0] == wide[0]
    assert wide[-1] > narrow[-1] + 0.1


def test_batches_without_any_difference_do_not_move_the_policy():
    problem = toy_problem(WEIGHTS, HARM, evaluations=100)
    problem.evaluate = lambda bits: 1.0
    entropies = record_entropies(problem, SETTINGS)
    assert entropies == pytest.approx([entropies[0]] * len(entropies), abs=1e-6)


def uninformative(problem):
    """The same problem, but a layer alone makes no difference."""
    together = problem.evaluate
    problem.evaluate = lambda bits: 1.0 if None in bits.values() else together(bits)
    return problem


def record_entropies(problem, settings) -> list[float]:
    """The policy's mean entropy at each step of a search."""
    found, forward = [], Controller.forward

    def watched(self, samples, generator):
        drawn = forward(self, samples, generator)
        found.append(drawn[2].mean().item())
        return drawn

    Controller.forward = watched
    try:
        learn_bits(problem, settings)
    finally:
        Controller.forward = forward
    return found


@pytest.mark.parametrize("evaluations", [1, 2, 3, 5, 18, 19, 100])
def test_every_evaluation_is_used_and_none_beyond(evaluations):
    problem = toy_problem(WEIGHTS, HARM, evaluations=evaluations)
    calls, evaluate = [], problem.evaluate
    problem.evaluate = lambda bits: calls.append(bits) or evaluate(bits)
    sensitivities = learn_bits(problem, SETTINGS)
    assert len(calls) == evaluations
    assert (sensitivities is not None) == (evaluations >= 19)  # one of each of the 8 layers leaves as many to learn
    assert problem.budget.used(problem.best) <= problem.budget.bits


def test_the_same_seed_tries_the_same_and_another_one_others():
    def tried(seed: int) -> list[float]:
        problem = toy_problem(WEIGHTS, HARM, evaluations=60, seed=seed)
        learn_bits(problem, SETTINGS)
        return problem.tried

    state = torch.get_rng_state()
    assert tried(0) == tried(0) != tried(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fresh_controller_draws_from_the_prior_in_every_layer():
    torch.manual_seed(0)
    controller = Controller(torch.randn(5, 3), torch.tensor([[0.0, 1.0, -1.0]]).expand(5, 3), hidden_units=8)
    allocation, log_probability, entropy, values = controller(4000, torch.Generator().manual_seed(0))
    prior = torch.log_softmax(controller.prior[0], 0)
    assert torch.allclose(log_probability, prior[allocation].sum(1), atol=1e-5)
    assert torch.allclose(entropy, -(prior.exp() * prior).sum().expand(4000), atol=1e-5)
    assert torch.equal(values.argmax(2), allocation)
    shares = torch.stack([(allocation == choice).float().mean(0) for choice in range(3)], 1)
    assert torch.allclose(shares, prior.exp().expand(5, 3), atol=0.03)


def test_the_policy_gradient_is_that_of_the_expected_reward():
    """One layer, two choices: against the derivative of p(b) r(b), summed exactly."""
    controller = Controller(torch.ones(1, 2), torch.zeros(1, 2), hidden_units=4)
    rewards = torch.tensor([1.0, 3.0])
    allocation, log_probability, _, _ = controller(20_000, torch.Generator().manual_seed(0))
    estimate = torch.autograd.grad((rewards[allocation[:, 0]] * log_probability).mean(), controller.head.bias)[0]
    assert torch.allclose(estimate, torch.tensor([-0.5, 0.5]), atol=0.03)

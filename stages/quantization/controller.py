"""The controller: a recurrent policy that learns the bits of each layer by policy gradient.

It follows the description in arXiv 2409.02134 (a controller trained by policy gradient chooses each layer's bit-width),
which gives no details. Here it is the recurrent controller of neural architecture search (arXiv 1611.01578, section
3.2), trained by REINFORCE (Williams 1992) with a moving-average baseline and an entropy bonus.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.params.quantizers import LearnedBits
from stages.quantization.layers import LAYER_KINDS
from stages.quantization.searches import (
    Problem,
    Sensitivities,
    around,
    average_bits,
    measure_sensitivities,
    solve,
)

BASELINE_DECAY = 0.8
GRADIENT_NORM = 1.0
FLOOR = 1e-12
"""Lower bound of errors and random numbers before their logarithm."""
INFORMED_STD = 0.5
"""Standard deviation of the first policy around the choice by sensitivities, in steps between choices."""
LEAST_STD = 0.1
"""Lower bound of the divisor of rewards, as a fraction of their usual std, so that a tie does not become a signal."""


class Controller(nn.Module):
    """Maps each layer's features and the bits of the layer before to logits over the choices.

    Args:
        features: float32 `[L, F]`.
        prior: float32 `[L, B]`: logits of the first policy.
    """

    def __init__(self, features: torch.Tensor, prior: torch.Tensor, hidden_units: int) -> None:
        super().__init__()
        self.register_buffer("features", features)
        self.register_buffer("prior", prior)
        self.embedding = nn.Embedding(prior.shape[1] + 1, hidden_units)
        self.encode = nn.Linear(features.shape[1], hidden_units)
        self.cell = nn.LSTMCell(hidden_units, hidden_units)
        self.head = nn.Linear(hidden_units, prior.shape[1])
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, samples: int, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw allocations layer by layer, or take the most probable choices if there is no generator.

        Returns:
            int64 `[S, L]`: indices of the choices; float32 `[S]`: log-probability of each allocation; float32 `[S]`:
            mean entropy of its layers' policies; float32 `[S, L, B]`: log-probabilities of all choices plus Gumbel
            noise, the largest of which is the choice drawn (arXiv 1611.01144, equation 1).
        """
        hidden = cell = torch.zeros(samples, self.cell.hidden_size)
        before = torch.full((samples,), self.prior.shape[1])  # no layer before
        actions, policies, noisy = [], [], []
        for encoded, prior in zip(self.encode(self.features), self.prior, strict=True):
            hidden, cell = self.cell(torch.relu(encoded + self.embedding(before)), (hidden, cell))
            policy = F.log_softmax(self.head(hidden) + prior, 1)
            values = policy.detach()
            if generator is not None:
                uniform = torch.rand(policy.shape, generator=generator).clamp(FLOOR, 1 - 1e-7)
                values = values - torch.log(-torch.log(uniform))
            before = values.argmax(1)
            actions.append(before)
            policies.append(policy)
            noisy.append(values)
        allocation, policy = torch.stack(actions, 1), torch.stack(policies, 1)
        log_probability = policy.gather(2, allocation[:, :, None]).sum((1, 2))
        entropy = -(policy.exp() * policy).sum(2).mean(1)
        return allocation, log_probability, entropy, torch.stack(noisy, 1)


def learn_bits(problem: Problem, quantizer: LearnedBits) -> Sensitivities | None:
    """Train a controller within the problem's evaluations; the problem records the best allocation tried.

    The search tries even bits first, then the policy's most probable allocation before training and, at the end, after
    it. Each drawn allocation is projected onto the budget by moves that cost the policy, with the noise of the draw,
    least for the bits, so that nearby draws stay different. The reward is that of the projected allocation, but the
    gradient credits the drawn one: a small bias where the two differ.
    If evaluations suffice, one choice of every layer is measured first. The policy then starts around the solution of
    the integer linear program for these sensitivities, which are also features; otherwise around the budget's average.
    With `learning_rate` 0 it stays there: the control that shows the effect of learning.
    """
    layers = len(problem.layers)
    problem.try_evenly()
    sensitivities = measure_sensitivities(problem, layers) if problem.evaluations >= 2 * layers + 3 else None
    left = problem.evaluations - 3 - (layers if sensitivities else 0)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        prior = torch.tensor(_prior(problem, sensitivities), dtype=torch.float32)
        controller = Controller(_features(problem, sensitivities), prior, quantizer.hidden_units)
    generator = torch.Generator().manual_seed(problem.seed)
    optimizer = torch.optim.Adam(controller.parameters(), quantizer.learning_rate)
    baseline = usual_std = None
    if problem.evaluations > 2:
        _try_most_probable(problem, controller)
    for start in range(0, left, quantizer.samples):
        samples = min(quantizer.samples, left - start)
        allocations, log_probability, entropy, values = controller(samples, generator)
        rewards = -torch.tensor(_losses(problem, allocations, values))
        mean, std = rewards.mean().item(), rewards.std(correction=0).item()
        baseline = mean if baseline is None else _moving(baseline, mean)
        usual_std = std if usual_std is None else _moving(usual_std, std)
        if usual_std == 0:  # no draw has made a difference yet
            continue
        advantage = (rewards - baseline) / max(std, LEAST_STD * usual_std)
        advantage = advantage.clamp(-3, 3)  # one very bad draw must not dominate
        bonus = quantizer.entropy_weight * (1 - start / left)
        loss = -(advantage * log_probability / layers).mean() - bonus * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(controller.parameters(), GRADIENT_NORM)
        optimizer.step()
    if problem.evaluations > 1:
        _try_most_probable(problem, controller)
    return sensitivities


def _try_most_probable(problem: Problem, controller: Controller) -> None:
    with torch.no_grad():
        allocation, _, _, values = controller(1, None)
    _losses(problem, allocation, values)


def _losses(problem: Problem, allocations: torch.Tensor, values: torch.Tensor) -> list[float]:
    """The loss of each drawn allocation, `[S, L]`, after projection onto the budget by its values, `[S, L, B]`."""
    return [
        problem.try_out(problem.budget.project(allocation, wanted))
        for allocation, wanted in zip(allocations.numpy(), values.double().numpy(), strict=True)
    ]


def _moving(average: float, value: float) -> float:
    return BASELINE_DECAY * average + (1 - BASELINE_DECAY) * value


def _features(problem: Problem, sensitivities: Sensitivities | None) -> torch.Tensor:
    """Features of each layer, `[L, F]`: kind, shape, cost, weight statistics, sensitivity, position."""
    layers = problem.layers
    kinds = [[float(layer.kind == kind) for kind in LAYER_KINDS] for layer in layers]
    sizes = [[layer.inputs, layer.outputs, layer.window, layer.weights, layer.macs] for layer in layers]
    numbers = [np.log(np.maximum(sizes, 1)), np.log(problem.errors + FLOOR), problem.statistics]
    if sensitivities is not None:
        measured = sensitivities.rises[:, sensitivities.measured]
        numbers.append(np.log(np.maximum(measured, 0) + 1e-6))
    numbers.append(np.linspace(0, 1, len(layers))[:, None])
    stacked = np.concatenate(numbers, 1)
    std = stacked.std(0)
    standard = (stacked - stacked.mean(0)) / np.where(std > 0, std, 1)
    return torch.tensor(np.concatenate([kinds, standard], 1), dtype=torch.float32)


def _prior(problem: Problem, sensitivities: Sensitivities | None) -> np.ndarray:
    """Logits of the first policy, `[L, B]`: around the best bits by sensitivities, or the budget's average."""
    budget = problem.budget
    if sensitivities is None:
        return around(budget, np.full(len(problem.layers), average_bits(budget)))
    return around(budget, budget.choices[solve(sensitivities.rises, budget)].astype(float), INFORMED_STD)

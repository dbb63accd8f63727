"""The controller: a recurrent policy that learns by policy gradient which layer gets how many bits.

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
"""What a logarithm of a size or an error does not go under."""
INFORMED_SPREAD = 0.5
"""Standard deviation of the first policy around what sensitivities ask for, in steps from choice to choice."""
LEAST_SPREAD = 0.1
"""What rewards are divided by at least: a share of their usual spread, so that a tie is not blown up to a signal."""


class Controller(nn.Module):
    """From each layer's features and the bits of the layer before to logits over the choices.

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
        """Draw allocations layer by layer; without a generator, the policy's likeliest choice in each.

        Returns:
            int64 `[S, L]`: indices of the choices; float32 `[S]`: log-probability of each allocation; float32 `[S]`:
            the mean entropy of its layers' policies; float32 `[S, L, B]`: log-probabilities of all choices plus the
            Gumbel noise whose largest sum is the choice drawn (arXiv 1611.01144, equation 1).
        """
        hidden = cell = torch.zeros(samples, self.cell.hidden_size)
        before = torch.full((samples,), self.prior.shape[1])  # nothing yet
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
    """Train a controller within the problem's evaluations; the best allocation that it tried is the problem's.

    Even bits are tried first, then the policy's likeliest allocation before and, at the end, after training. A drawn
    allocation is projected onto the budget, each move where the policy, with the very noise of the draw, loses least
    for the bits: so nearby draws stay different. The reward is that of the projected allocation; the gradient credits
    the drawn one, which is a small bias where the two differ.
    Where evaluations suffice, one choice of every layer is measured first. The policy then begins around what the
    integer programme makes of these sensitivities (`solve`), which are among the features too; else around the budget's
    average. With `learning_rate` 0 it stays there: the control that tells what learning adds.
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
    baseline = usual_spread = None
    if problem.evaluations > 2:
        _try_likeliest(problem, controller)
    for start in range(0, left, quantizer.samples):
        samples = min(quantizer.samples, left - start)
        allocations, log_probability, entropy, values = controller(samples, generator)
        rewards = -torch.tensor(_objectives(problem, allocations, values))
        mean, spread = rewards.mean().item(), rewards.std(correction=0).item()
        baseline = mean if baseline is None else _moved(baseline, mean)
        usual_spread = spread if usual_spread is None else _moved(usual_spread, spread)
        if usual_spread == 0:  # nothing that was tried made a difference yet
            continue
        advantage = (rewards - baseline) / max(spread, LEAST_SPREAD * usual_spread)
        advantage = advantage.clamp(-3, 3)  # a loss may be anything: one bad draw is not all
        bonus = quantizer.entropy_weight * (1 - start / left)
        loss = -(advantage * log_probability / layers).mean() - bonus * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(controller.parameters(), GRADIENT_NORM)
        optimizer.step()
    if problem.evaluations > 1:
        _try_likeliest(problem, controller)
    return sensitivities


def _try_likeliest(problem: Problem, controller: Controller) -> None:
    with torch.no_grad():
        allocation, _, _, values = controller(1, None)
    _objectives(problem, allocation, values)


def _objectives(problem: Problem, allocations: torch.Tensor, values: torch.Tensor) -> list[float]:
    """Of each drawn allocation, `[S, L]`, as projected onto the budget by its values, `[S, L, B]`."""
    return [
        problem.try_out(problem.budget.project(allocation, wanted))
        for allocation, wanted in zip(allocations.numpy(), values.double().numpy(), strict=True)
    ]


def _moved(average: float, value: float) -> float:
    return BASELINE_DECAY * average + (1 - BASELINE_DECAY) * value


def _features(problem: Problem, sensitivities: Sensitivities | None) -> torch.Tensor:
    """What the controller sees of each layer: kind, shape, cost, weight statistics, sensitivity, position; `[L, F]`."""
    layers = problem.layers
    kinds = [[float(layer.kind == kind) for kind in LAYER_KINDS] for layer in layers]
    sizes = [[layer.inputs, layer.outputs, layer.window, layer.weights, layer.macs] for layer in layers]
    numbers = [np.log(np.maximum(sizes, 1)), np.log(problem.errors + FLOOR), problem.statistics]
    if sensitivities is not None:
        measured = sensitivities.rises[:, sensitivities.measured]
        numbers.append(np.log(np.maximum(measured, 0) + 1e-6))
    numbers.append(np.linspace(0, 1, len(layers))[:, None])
    stacked = np.concatenate(numbers, 1)
    spread = stacked.std(0)
    standard = (stacked - stacked.mean(0)) / np.where(spread > 0, spread, 1)
    return torch.tensor(np.concatenate([kinds, standard], 1), dtype=torch.float32)


def _prior(problem: Problem, sensitivities: Sensitivities | None) -> np.ndarray:
    """Logits of the first policy, `[L, B]`: around the bits that the sensitivities ask for, or the budget's average."""
    budget = problem.budget
    if sensitivities is None:
        return around(budget, np.full(len(problem.layers), average_bits(budget)))
    return around(budget, budget.choices[solve(sensitivities.rises, budget)].astype(float), INFORMED_SPREAD)

"""The controller: a recurrent policy that learns by policy gradient which layer gets how many bits.

It follows the description in arXiv 2409.02134 (a controller trained by policy gradient chooses each layer's bit-width),
which gives no details. Here it is the recurrent controller of neural architecture search (arXiv 1611.01578, section
3.2), trained by REINFORCE (Williams 1992) with a moving-average baseline and an entropy bonus.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.common.params import LearnedBits
from stages.quantization.layers import LAYER_KINDS
from stages.quantization.searches import Problem, Sensitivities, measure_sensitivities

BASELINE_DECAY = 0.8
GRADIENT_NORM = 1.0
FLOOR = 1e-12
"""What a logarithm of a size or an error does not go under."""
PRIOR_SPREAD = 1 / 3
"""Of the first policy around the budget's average: a share of the range of choices."""


class Controller(nn.Module):
    """From each layer's features and the bits of the layer before to logits over the choices.

    Args:
        features: float32 `[L, F]`.
        prior: float32 `[B]`: logits of the first policy, the same for all layers.
    """

    def __init__(self, features: torch.Tensor, prior: torch.Tensor, hidden_units: int) -> None:
        super().__init__()
        self.register_buffer("features", features)
        self.register_buffer("prior", prior)
        self.embedding = nn.Embedding(len(prior) + 1, hidden_units)
        self.encode = nn.Linear(features.shape[1], hidden_units)
        self.cell = nn.LSTMCell(hidden_units, hidden_units)
        self.head = nn.Linear(hidden_units, len(prior))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, samples: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw allocations layer by layer.

        Returns:
            int64 `[S, L]`: indices of the choices; float32 `[S]`: log-probability of each allocation; float32 `[S]`:
            the mean entropy of its layers' policies; float32 `[S, L, B]`: log-probabilities of all choices plus the
            Gumbel noise whose largest sum is the choice drawn (arXiv 1611.01144, equation 1).
        """
        hidden = cell = torch.zeros(samples, self.cell.hidden_size)
        before = torch.full((samples,), len(self.prior))  # nothing yet
        actions, policies, noisy = [], [], []
        for encoded in self.encode(self.features):
            hidden, cell = self.cell(torch.relu(encoded + self.embedding(before)), (hidden, cell))
            policy = F.log_softmax(self.head(hidden) + self.prior, 1)
            uniform = torch.rand(policy.shape, generator=generator).clamp(FLOOR, 1 - 1e-7)
            values = policy.detach() - torch.log(-torch.log(uniform))
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

    A drawn allocation is projected onto the budget, each move where the policy, with the very noise of the draw, loses
    least for the bits: so nearby draws stay different. The reward is the projected allocation's: the projection is part
    of the environment, and the gradient that of what is measured.
    Where evaluations suffice, one choice of every layer is measured first: the sensitivity among the features.
    """
    layers = len(problem.layers)
    sensitivities = measure_sensitivities(problem, layers) if problem.evaluations >= 2 * layers else None
    left = problem.evaluations - (layers if sensitivities else 0)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        controller = Controller(_features(problem, sensitivities), _prior(problem), quantizer.hidden_units)
    generator = torch.Generator().manual_seed(problem.seed)
    optimizer = torch.optim.Adam(controller.parameters(), quantizer.learning_rate)
    baseline = None
    for start in range(0, left, quantizer.samples):
        samples = min(quantizer.samples, left - start)
        allocations, log_probability, entropy, values = controller(samples, generator)
        rewards = torch.tensor(
            [
                -problem.try_out(problem.budget.project(allocation, wanted))
                for allocation, wanted in zip(allocations.numpy(), values.double().numpy(), strict=True)
            ]
        )
        mean = rewards.mean().item()
        baseline = mean if baseline is None else BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * mean
        spread = rewards.std(correction=0).clamp_min(FLOOR)
        advantage = ((rewards - baseline) / spread).clamp(-3, 3)  # a loss may be anything: one bad draw is not all
        bonus = quantizer.entropy_weight * (1 - start / left)
        loss = -(advantage * log_probability / layers).mean() - bonus * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(controller.parameters(), GRADIENT_NORM)
        optimizer.step()
    return sensitivities


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


def _prior(problem: Problem) -> torch.Tensor:
    """Logits of a first policy around the budget's average bits."""
    average = problem.budget.bits / problem.budget.weights.sum()
    choices = problem.budget.choices
    distance = torch.tensor((choices - average) / (PRIOR_SPREAD * np.ptp(choices)), dtype=torch.float32)
    return -distance.square() / 2

"""Unstructured pruning: single weights become zero, at once or gradually, and stay zero."""

from typing import Any

import torch
from torch import nn

from stages.common.errors import UserError
from stages.params.pruners import Unstructured
from stages.pruning.steering import pruning_schedule
from stages.training.constraint import Constraint


def prunable_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of all convolutions and Linear layers by name.

    Raises:
        UserError: If there are none.
    """
    weights = {
        f"{name}.weight": module.weight.detach()
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    if not weights:
        raise UserError(f"{type(network).__name__}: has no convolution or Linear layer to prune")
    return weights


def zeros_of(
    network: nn.Module,
    pruner: Unstructured,
    seed: int,
    sparsity: float | None = None,
    zeros: dict[str, torch.Tensor] | None = None,
    *,
    key: str,
) -> dict[str, torch.Tensor]:
    """Choose the weights to prune: those of least magnitude, or at random.

    Args:
        pruner: round(sparsity * weights) are chosen, among all at once (`global`) or in each layer (`layer`). The
            pattern 2:4 chooses two of every four neighboring inputs in every layer whose inputs are a multiple of 4.
        seed: Seed of the random choice; it fixes one order for every sparsity. torch's random state stays as it is.
        sparsity: Replaces the pruner's.
        zeros: An earlier choice, all of which is chosen again.
        key: The pruner's place in params.yaml, for messages.

    Returns:
        bool of each weight's shape by name, on its device: True where it becomes zero.

    Raises:
        UserError: If some layer would keep no weight, and so pass neither signal nor gradient; with the pattern 2:4, if
            it fits no layer.
    """
    sparsity = pruner.sparsity if sparsity is None else sparsity
    scores = _scores(prunable_weights(network), pruner, seed)
    for name, earlier in (zeros or {}).items():
        scores[name] = scores[name].masked_fill(earlier.to(scores[name].device), -1)
    if pruner.pattern == "2:4":
        return _two_of_four(scores, left_dense(network), key)
    if pruner.scope == "layer":
        chosen = {name: _lowest(score.flatten(), sparsity).view(score.shape) for name, score in scores.items()}
    else:
        row = _lowest(torch.cat([score.flatten() for score in scores.values()]), sparsity)
        parts = row.split([score.numel() for score in scores.values()])
        chosen = {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}
    if emptied := [name.removesuffix(".weight") for name, mask in chosen.items() if mask.all()]:
        remedy = "lower it" + (f", or set {key}.scope: layer" if pruner.scope == "global" else "")
        raise UserError(
            f"{key}.sparsity = {pruner.sparsity}: leaves no weight in {', '.join(emptied[:3])}"
            f"{f' and {len(emptied) - 3} more layers' if len(emptied) > 3 else ''}: {remedy}"
        )
    return chosen


def left_dense(network: nn.Module) -> list[str]:
    """The layers that the pattern 2:4 does not fit, since 4 does not divide the number of inputs of an output.

    Depthwise convolutions (one input) and a stem that reads three colors are among them.
    """
    weights = prunable_weights(network)
    return [name.removesuffix(".weight") for name, weight in weights.items() if weight.shape[1] % 4]


def _scores(weights: dict[str, torch.Tensor], pruner: Unstructured, seed: int) -> dict[str, torch.Tensor]:
    """Scores of at least 0, of which the lowest go first: magnitudes, or one random number for each weight."""
    if pruner.method == "l1_unstructured":
        return {name: weight.abs() for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in weights.items()}


def _lowest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """bool `[N]`: True at the round(sparsity * N) lowest of the scores `[N]`."""
    lowest = scores.topk(round(sparsity * len(scores)), largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, lowest, True)


def _two_of_four(scores: dict[str, torch.Tensor], unfit: list[str], key: str) -> dict[str, torch.Tensor]:
    """Choose the two lowest of every four neighboring inputs of each output, at each kernel position."""
    chosen = {}
    for name, score in scores.items():
        if name.removesuffix(".weight") not in unfit:
            fours = score.movedim(1, -1).unflatten(-1, (-1, 4))
            lowest = fours.topk(2, largest=False, sorted=False).indices
            mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, lowest, True)
            chosen[name] = mask.flatten(-2).movedim(-1, 1)
    if not chosen:
        raise UserError(
            f"{key}.pattern = '2:4': fits no layer of this network, since none reads a multiple of 4 inputs: set it to"
            " none"
        )
    return chosen


def sparsity_of(network: nn.Module) -> float:
    """Fraction of zeros among the weights that can be pruned."""
    weights = prunable_weights(network).values()
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def sparsities(pruner: Unstructured, steps: int, key: str) -> dict[int, float]:
    """Map the steps after which weights are chosen to the fraction of weights that is zero from then on.

    `one_shot` chooses before the first step. `gradual` is equation 1 of arXiv 1710.01878 with s_i = 0:
    s_t = s_f (1 - (1 - (t - t0) / (n dt))^3) at t = t0 + dt, ..., t0 + n dt, from `start_fraction` to at most
    `end_fraction` of the steps, n being `pruning_periods`. (At t0 itself no weight is zero.)

    Raises:
        UserError: If there is not at least one step for each choice.
    """
    if pruner.schedule == "one_shot":
        return {0: pruner.sparsity}
    timing, count = pruning_schedule(pruner, steps, key, pruner.pruning_periods), pruner.pruning_periods
    return {timing.start + i * timing.length: pruner.sparsity * (1 - (1 - i / count) ** 3) for i in range(1, count + 1)}


class KeepZeros(Constraint):
    """Chooses weights by a schedule and keeps them at zero.

    Each choice depends on the present weights, but weights that are zero stay zero.

    Args:
        network: Its weights are zeroed in place: at once by a one-shot pruner, otherwise after the scheduled steps. It
            may move to another device before the first step.
        steps: Optimizer steps of the whole training.
        seed: Seed of the random choice.
        key: The pruner's place in params.yaml, for messages.

    Raises:
        UserError: If the periods do not fit into the steps, or some layer would keep no weight. (Only training shows
            which layers a gradual global choice by magnitude empties.)
    """

    def __init__(self, network: nn.Module, pruner: Unstructured, steps: int, seed: int, key: str) -> None:
        self._network, self._pruner, self._seed, self._key = network, pruner, seed, key
        self._sparsities = sparsities(pruner, steps, key)
        self.zeros: dict[str, torch.Tensor] = {}
        """bool of each weight's shape by name: True where it is held at zero."""
        self._factors: tuple[list[nn.Parameter], list[torch.Tensor]] | None = None
        if 0 in self._sparsities:
            self._choose(0)
            self.project(network)
        elif pruner.scope == "layer" or pruner.method == "random_unstructured":
            zeros_of(network, pruner, seed, key=key)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step + 1 in self._sparsities:
            self._choose(step + 1)
        if self.zeros:
            self._factors = self._factors or _factors(self._network, self.zeros)
            torch._foreach_mul_(*self._factors)  # a tenth of the time of masked_fill_, which is not vectorized

    @torch.no_grad()
    def project(self, network: nn.Module) -> None:
        """Set the chosen weights of a network to +0; `after_step` leaves zeros of either sign."""
        parameters = dict(network.named_parameters())
        for name, zeros in self.zeros.items():
            parameters[name].masked_fill_(zeros.to(parameters[name].device), 0)

    def met_after(self, step: int) -> bool:
        """True from the last choice on."""
        return step + 1 >= max(self._sparsities)

    def state_dict(self) -> dict[str, Any]:
        return {"zeros": self.zeros}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.zeros, self._factors = dict(state["zeros"]), None

    def _choose(self, done: int) -> None:
        sparsity = self._sparsities[done]
        self.zeros = zeros_of(self._network, self._pruner, self._seed, sparsity, self.zeros, key=self._key)
        self._factors = None


def _factors(network: nn.Module, zeros: dict[str, torch.Tensor]) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """The parameters, and for each its factors 0 and 1, on its device and in its memory layout."""
    held = [(p, torch.empty_like(p).copy_(~zeros[name])) for name, p in network.named_parameters() if name in zeros]
    return [parameter for parameter, _ in held], [factors for _, factors in held]

"""Unstructured pruning: single weights set to zero, at once or little by little, and kept there."""

from typing import Any

import torch
from torch import nn

from stages.common.errors import UserError
from stages.params.pruners import Unstructured


def prunable_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of all convolutions and Linear layers by name; biases and norms are left alone.

    Raises:
        UserError: if there are none.
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
        pruner: round(sparsity * weights) are chosen, among all at once (`global`) or in each layer (`layer`); with the
            pattern 2:4, two of every four neighbouring inputs, in every layer whose inputs are a multiple of 4.
        seed: of the random choice, whose order it fixes for every sparsity; torch's own random state is left as it is.
        sparsity: instead of the pruner's.
        zeros: an earlier choice, all of it chosen again, from which no weight comes back.
        key: of the pruner in the params, for messages.

    Returns:
        For each weight by name, bool of its shape, on its device: True where it is to be zero.

    Raises:
        UserError: if no weight of some layer would be left: nothing passes such a layer, nor any gradient to train it.
            With the pattern 2:4, if no layer fits.
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
    """The layers that the pattern 2:4 does not fit: those whose outputs read a number of inputs that 4 does not divide.

    Among them all depthwise convolutions (one input for each output) and a stem that reads three colours.
    """
    weights = prunable_weights(network)
    return [name.removesuffix(".weight") for name, weight in weights.items() if weight.shape[1] % 4]


def _scores(weights: dict[str, torch.Tensor], pruner: Unstructured, seed: int) -> dict[str, torch.Tensor]:
    """What is lowest goes first: the magnitude, or one random number for each weight; never negative."""
    if pruner.method == "l1_unstructured":
        return {name: weight.abs() for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in weights.items()}


def _lowest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """bool `[N]`: True at the round(sparsity * N) lowest of the scores `[N]`."""
    lowest = scores.topk(round(sparsity * len(scores)), largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, lowest, True)


def _two_of_four(scores: dict[str, torch.Tensor], unfit: list[str], key: str) -> dict[str, torch.Tensor]:
    """The two lowest of every four neighbouring inputs of each output, in convolutions at each kernel position."""
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
    """Share of zeros among the weights that can be pruned."""
    weights = prunable_weights(network).values()
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def sparsities(pruner: Unstructured, steps: int, key: str) -> dict[int, float]:
    """When weights are chosen (after how many steps of a training of `steps`), and what share of them is then zero.

    `one_shot` chooses before the first step. `gradual` is equation 1 of arXiv 1710.01878 with s_i = 0:
    s_t = s_f (1 - (1 - (t - t0) / (n dt))^3) at t = t0 + dt, ..., t0 + n dt, from `start_fraction` to at most
    `end_fraction` of the steps, n being `pruning_periods`. (At t0 itself nothing is zero.)

    Raises:
        UserError: if there is not at least one step for each pruning.
    """
    if pruner.schedule == "one_shot":
        return {0: pruner.sparsity}
    start, end, count = round(pruner.start_fraction * steps), round(pruner.end_fraction * steps), pruner.pruning_periods
    interval = (end - start) // count
    if interval < 1:
        raise UserError(
            f"{key}.pruning_periods = {count}: only {end - start} of {steps} steps lie between start_fraction"
            f" {pruner.start_fraction} and end_fraction {pruner.end_fraction}; each period needs one: lower"
            f" pruning_periods or finetune.batch_size (steps in an epoch: {steps // pruner.epochs}), or raise epochs or"
            " end_fraction"
        )
    return {start + i * interval: pruner.sparsity * (1 - (1 - i / count) ** 3) for i in range(1, count + 1)}


class KeepZeros:
    """Chooses weights when the schedule says so and keeps them at zero (`training.constraint.Constraint`).

    Each choice is made anew from the weights of the moment, but what is zero stays zero.

    Args:
        network: its weights are zeroed in place: at once by a one-shot pruner, else after the steps. It may be moved to
            another device before the first step.
        steps: in the whole training.
        seed: of the random choice.
        key: of the pruner in the params, for messages.

    Raises:
        UserError: if the periods do not fit into the steps, or would leave no weight in some layer. Which layers a
            gradual global choice by magnitude empties shows only while it trains; all else is refused here.
    """

    def __init__(self, network: nn.Module, pruner: Unstructured, steps: int, seed: int, key: str) -> None:
        self._network, self._pruner, self._seed, self._key = network, pruner, seed, key
        self._sparsities = sparsities(pruner, steps, key)
        self.zeros: dict[str, torch.Tensor] = {}
        """For each weight by name, bool of its shape: True where it is held at zero."""
        self._factors: tuple[list[nn.Parameter], list[torch.Tensor]] | None = None
        if 0 in self._sparsities:
            self._choose(0)
            self.project(network)
        elif pruner.scope == "layer" or pruner.method == "random_unstructured":
            zeros_of(network, pruner, seed, key=key)

    def before_step(self, step: int) -> None:
        pass

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step + 1 in self._sparsities:
            self._choose(step + 1)
        if self.zeros:
            self._factors = self._factors or _factors(self._network, self.zeros)
            torch._foreach_mul_(*self._factors)  # a tenth of the time of masked_fill_, which no CPU vectorises

    @torch.no_grad()
    def project(self, network: nn.Module) -> None:
        """Put a copy on the constraint, or the trained network: products are zeros of either sign, these are all +0."""
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
    """The parameters, and for each the factors 0 and 1, on its device and laid out in memory as it is."""
    held = [(p, torch.empty_like(p).copy_(~zeros[name])) for name, p in network.named_parameters() if name in zeros]
    return [parameter for parameter, _ in held], [factors for _, factors in held]

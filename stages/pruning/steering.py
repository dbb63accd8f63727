"""The common part of the methods that drive channels to zero during training: HESSO, DHSPG and the group lasso.

A schedule says on which steps a method acts, saliency scores say which channels matter least, and masks scale channels
in place. `ScheduledConstraint` is the base of the three methods, `Steering` that of HESSO and DHSPG.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stages.common.errors import UserError
from stages.networks.modules import along_outputs
from stages.params.pruners import Depgraph, Importance, Oto, Unstructured
from stages.pruning.costs import Costs
from stages.pruning.groups import ChannelGroup, by_group, zero_channels
from stages.pruning.targets import check_target, choose_channels
from stages.training.constraint import Constraint


@dataclass(frozen=True)
class PruningSchedule:
    """Steps, counted from 0: warm-up before `start`, then `periods` of `length` steps, then recovery."""

    start: int
    length: int
    periods: int

    @property
    def end(self) -> int:
        """The first step of recovery."""
        return self.start + self.periods * self.length


def pruning_schedule(
    pruner: Oto | Depgraph | Unstructured, steps: int, key: str, periods: int | None = None
) -> PruningSchedule:
    """Convert the pruner's fractions to steps of a training of `steps`.

    Args:
        key: The pruner's place in params.yaml, for messages.
        periods: `pruning_periods` of a method that has them; others have one period.

    Raises:
        UserError: If there is not at least one step for each period.
    """
    start, end = round(pruner.start_fraction * steps), round(pruner.end_fraction * steps)
    length = (end - start) // (periods or 1)
    if length >= 1:
        return PruningSchedule(start, length, periods or 1)
    setting = f"pruning_periods = {periods}" if periods else f"end_fraction = {pruner.end_fraction}"
    raise UserError(
        f"{key}.{setting}: only {end - start} of {steps} steps lie between start_fraction {pruner.start_fraction} and"
        f" end_fraction {pruner.end_fraction}, and each period needs one: lower"
        f" {'pruning_periods or ' if periods else ''}finetune.batch_size (steps in an epoch: {steps // pruner.epochs}),"
        " or raise epochs or end_fraction"
    )


class ScheduledConstraint(Constraint):
    """A constraint that acts on the steps of a schedule and is met at its end."""

    def __init__(self, schedule: PruningSchedule) -> None:
        self.schedule = schedule

    def met_after(self, step: int) -> bool:
        """True from the schedule's last step on."""
        return step >= self.schedule.end - 1


class Steering(ScheduledConstraint):
    """Drives the least important channels to zero while any torch optimizer steps by itself.

    Momentum, weight decay and Muon stay torch's. With a target of zero it changes nothing.

    Args:
        network: Its parameters are steered; `named_parameters` must hold every name in `groups`. The network may move
            to another device before the first step.
        groups: C channels in all. `pruning.targets.choose_channels` decides which of them go.
        costs: The network's costs, for the same groups.
        steps: Optimizer steps of the whole training.
        key: The pruner's place in params.yaml, for messages.

    Raises:
        UserError: If the schedule does not fit into the steps, or the target cannot be met.
    """

    def __init__(
        self, network: nn.Module, groups: Sequence[ChannelGroup], costs: Costs, pruner: Oto, steps: int, key: str
    ) -> None:
        check_target(groups, costs, pruner, key)
        self.active = any(pruner.target.values())
        periods = pruner.pruning_periods if pruner.optimizer == "hesso" else None
        super().__init__(pruning_schedule(pruner, steps, key, periods) if self.active else PruningSchedule(0, 0, 0))
        self.groups, self._costs, self._pruner, self._key = list(groups), costs, pruner, key
        self._parameters = dict(network.named_parameters())
        self.redundant = torch.zeros(sum(group.channels for group in groups), dtype=torch.bool)
        """bool `[C]`: channels on their way to zero, all groups in one row."""
        self.pruned = self.redundant
        """bool `[C]`: channels that are zero and stay so, all groups in one row."""

    def choose(self, pruned: torch.Tensor, fraction: float = 1.0) -> torch.Tensor:
        """bool `[C]`: the channels of least saliency that meet `fraction` of the target, with `pruned` among them."""
        scores = saliency(self.groups, self._parameters, self._pruner.importance, left=~pruned)
        return choose_channels(
            scores, self.groups, self._costs, self._pruner, fraction=fraction, pruned=pruned, key=self._key
        )

    def project(self, network: nn.Module) -> None:
        """Zero the pruned channels in another copy of the network, in place."""
        if self.active:
            zero_channels(network, self.groups, self.pruned_channels())

    def pruned_channels(self) -> dict[str, torch.Tensor]:
        """bool `[channels]` for each group by name."""
        return by_group(self.groups, self.pruned.cpu())


@torch.no_grad()
def saliency(
    groups: Sequence[ChannelGroup], parameters: Mapping[str, nn.Parameter], importance: Importance, left: torch.Tensor
) -> torch.Tensor:
    """Score every channel, all groups in one row, from its parameters x_g and their gradients grad_g.

    The scores are those of arXiv 2409.09085; the lower, the more redundant the channel is:

    - magnitude: ||x_g||
    - average magnitude: ||x_g|| / |g|, where |g| is the number of its parameters
    - cosine similarity: 1 + cos(x_g, -grad_g). A channel goes to zero along -x_g. Where the negative gradient points
      that way, pruning descends and the score is near 0. (only_train_once 3.0.1 has the opposite sign.)
    - first-order Taylor: |x_g . grad_g|, the change of the loss when x_g becomes zero
    - second-order Taylor: (x_g . grad_g)^2 / 2, with the gradient's outer product for the Hessian

    Each score is divided by its Euclidean norm over the channels that are left, then weighted and summed.

    Args:
        left: bool `[C]`, channels that are not pruned yet.

    Returns:
        float64 `[C]` on the parameters' device. A missing gradient counts as 0.
    """
    squares, gradient_squares, products, sizes = [], [], [], []
    for group in groups:
        rows = [parameters[part.name].detach().reshape(group.channels, -1) for part in group.makes]
        gradients = [
            torch.zeros_like(row) if (grad := parameters[part.name].grad) is None else grad.reshape(group.channels, -1)
            for part, row in zip(group.makes, rows, strict=True)
        ]
        squares.append(sum(x.pow(2).sum(1) for x in rows))
        gradient_squares.append(sum(g.pow(2).sum(1) for g in gradients))
        products.append(sum((x * g).sum(1) for x, g in zip(rows, gradients, strict=True)))
        sizes.append(torch.full((group.channels,), sum(x.shape[1] for x in rows), dtype=torch.float64))
    product = torch.cat(products).double()
    norm, gradient_norm = torch.cat(squares).double().sqrt(), torch.cat(gradient_squares).double().sqrt()
    tiny = torch.finfo(torch.float64).tiny
    scores = {
        "magnitude": norm,
        "average_magnitude": norm / torch.cat(sizes).to(norm.device),
        "cosine_similarity": 1 - product / (norm * gradient_norm).clamp_min(tiny),
        "taylor_first_order": product.abs(),
        "taylor_second_order": product.pow(2) / 2,
    }
    left = left.to(norm.device)
    weighted = [
        weight * scores[name] / (scores[name] * left).norm().clamp_min(tiny)
        for name, weight in importance.model_dump().items()
        if weight
    ]
    return torch.stack(weighted).sum(0)


class ChannelMask:
    """Scales channels in place, without index lists and without waiting for the device.

    On the CPU a mask has one number for each row of a parameter and is broadcast: multiplying rows takes half the time
    of filling them by index. On other devices it has the parameter's full shape and memory order, so that torch takes
    many parameters in one kernel.

    Args:
        groups: C channels in all; `parameters` holds every name in their `makes`.
        values: float or bool `[C]`, all groups in one row.
        neutral: The value that leaves a channel as it is. Groups that have no other are not touched.
        full: Whether masks have full shapes; by default they have where the parameters are not on the CPU.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[ChannelGroup],
        values: torch.Tensor,
        neutral: float,
        full: bool | None = None,
    ) -> None:
        self._parts: list[tuple[nn.Parameter, int]] = []
        self._masks: list[torch.Tensor] = []
        for group, factors in zip(groups, by_group(groups, values).values(), strict=True):
            if (factors == neutral).all():
                continue
            for part in group.makes:
                parameter = parameters[part.name]
                by_channel = _by_channel(parameter, part.repeat)
                mask = along_outputs(factors.to(parameter), by_channel)
                if parameter.device.type != "cpu" if full is None else full:
                    mask = torch.empty_like(by_channel).copy_(mask)
                self._parts.append((parameter, part.repeat))
                self._masks.append(mask)

    @torch.no_grad()
    def multiply(self) -> None:
        """Multiply each channel by its value: exactly zero where that is 0, unchanged where it is 1."""
        if self._masks:
            torch._foreach_mul_([_by_channel(*part) for part in self._parts], self._masks)

    @torch.no_grad()
    def subtract(self, fraction: float) -> None:
        """Subtract `fraction` x value from each channel: exactly zero if both are 1, unchanged if the value is 0."""
        if self._masks:
            channels = [_by_channel(*part) for part in self._parts]
            torch._foreach_addcmul_(channels, channels, self._masks, -fraction)


def _by_channel(parameter: nn.Parameter, repeat: int) -> torch.Tensor:
    """A view with the channel as first axis. Where a channel is a run of entries, these are the second axis."""
    return parameter if repeat == 1 else parameter.unflatten(0, (-1, repeat))

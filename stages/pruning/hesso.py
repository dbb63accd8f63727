"""HESSO, the Hybrid Efficient Structured Sparse Optimizer (arXiv 2409.09085), around any torch optimizer.

The paper states it as an optimizer of its own with SGD or Adam inside. Here the base optimizer steps by itself and
HESSO acts around it, so that momentum, weight decay and Muon stay torch's. With nothing to prune it does nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.common.errors import UserError
from stages.params.pruners import Importance, Oto
from stages.pruning.channel_mask import ChannelMask
from stages.pruning.costs import Costs
from stages.pruning.groups import ChannelGroup, by_group, zero_channels
from stages.pruning.targets import check_target, choose_channels


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


def pruning_schedule(pruner: Oto, steps: int, key: str) -> PruningSchedule:
    """The pruner's fractions as steps of a training of `steps`; DHSPG has one period.

    Raises:
        UserError: if there is not at least one step for each period.
    """
    start, end = round(pruner.start_fraction * steps), round(pruner.end_fraction * steps)
    periods = pruner.pruning_periods if pruner.optimizer == "hesso" else 1
    length, epoch = (end - start) // periods, steps // pruner.epochs
    if length < 1 and pruner.optimizer == "dhspg":
        raise UserError(
            f"{key}.end_fraction = {pruner.end_fraction}: no step of {steps} lies between start_fraction"
            f" {pruner.start_fraction} and it: raise it or epochs, or lower finetune.batch_size (steps in an epoch:"
            f" {epoch})"
        )
    if length < 1:
        raise UserError(
            f"{key}.pruning_periods = {periods}: only {end - start} of {steps} steps lie between"
            f" start_fraction {pruner.start_fraction} and end_fraction {pruner.end_fraction}; each period needs one:"
            f" lower pruning_periods or finetune.batch_size (steps in an epoch: {epoch}), or raise epochs or"
            " end_fraction"
        )
    return PruningSchedule(start, length, periods)


class Hesso:
    """Drives the least important channel groups to zero while the network trains (`training.constraint.Constraint`).

    Algorithm 1 of the paper, with its "groups" being channels here:

    - warm-up: the base optimizer alone;
    - in each of P pruning periods of T steps, the channels of lowest saliency are added to the redundant ones, so that
      after period p (counted from 0) the share (p + 1) / P of the target is met (the paper's K / P groups in each
      period, which `group_sparsity` gives; parameters and MACs are shared out in the same way);
    - hybrid training within a period: important channels follow the base optimizer alone; redundant ones are forgotten
      progressively: after the base optimizer's step at step t (counted from 0) they are multiplied by
      (T - t - 1) / (T - t). The factors multiply up to a straight line that ends at exactly zero;
    - channels of earlier periods are kept at zero, whatever the optimizer's momentum does, also in recovery.

    Args:
        network: its parameters are steered; `named_parameters` must hold every name in `groups`. The network may be
            moved to another device before the first step.
        groups: of C channels in all; which of them go is `pruning.targets.choose_channels`'s to say.
        costs: of the network, for the same groups.
        steps: optimizer steps in the whole training.
        key: of the pruner in the params, for messages.

    Raises:
        UserError: if the periods do not fit into the steps, or the target cannot be met.
    """

    def __init__(
        self, network: nn.Module, groups: Sequence[ChannelGroup], costs: Costs, pruner: Oto, steps: int, key: str
    ) -> None:
        check_target(groups, costs, pruner, key)
        self.groups, self._costs, self._pruner, self._key = list(groups), costs, pruner, key
        self._parameters = dict(network.named_parameters())
        self.active = any(pruner.target.values())
        self.schedule = pruning_schedule(pruner, steps, key) if self.active else PruningSchedule(0, 0, 0)
        nothing = torch.zeros(sum(group.channels for group in groups), dtype=torch.bool)
        self.pruned = nothing
        """bool `[C]`: channels at zero for good, all groups in one row."""
        self.redundant = nothing
        """bool `[C]`: channels that the present period is forgetting."""
        self._masks: tuple[ChannelMask, ChannelMask] | None = None

    def before_step(self, step: int) -> None:
        """At a period's first step, pick its redundant channels: only then are scores computed and the host waits."""
        schedule = self.schedule
        if schedule.start <= step < schedule.end and (step - schedule.start) % schedule.length == 0:
            period = (step - schedule.start) // schedule.length
            scores = saliency(self.groups, self._parameters, self._pruner.importance, left=~self.pruned)
            share = (period + 1) / schedule.periods
            chosen = choose_channels(
                scores, self.groups, self._costs, self._pruner, share=share, pruned=self.pruned, key=self._key
            )
            self._set(self.pruned, chosen & ~self.pruned)

    def after_step(self, step: int) -> None:
        """Forget the redundant channels a little more; at a period's last step they are zero and stay so."""
        schedule = self.schedule
        if step < schedule.start or not self.active:
            return
        if self._masks is None:
            keep, forget = (~self.pruned, 1), (self.redundant, 0)
            self._masks = tuple(ChannelMask(self._parameters, self.groups, *values) for values in (keep, forget))
        keep, forget = self._masks
        keep.multiply()
        if step >= schedule.end:
            return
        left = schedule.length - (step - schedule.start) % schedule.length
        forget.subtract(1 / left)
        if left == 1:
            self._set(self.pruned | self.redundant, torch.zeros_like(self.redundant))

    def project(self, network: nn.Module) -> None:
        """Zero the channels that are pruned for good in another copy of the network, in place."""
        if self.active:
            zero_channels(network, self.groups, self.pruned_channels())

    def met_after(self, step: int) -> bool:
        """True from the last period's last step on."""
        return step >= self.schedule.end - 1

    def pruned_channels(self) -> dict[str, torch.Tensor]:
        """For each group by name, bool `[channels]`."""
        return by_group(self.groups, self.pruned)

    def state_dict(self) -> dict[str, Any]:
        return {"pruned": self.pruned.clone(), "redundant": self.redundant.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set(state["pruned"].cpu().clone(), state["redundant"].cpu().clone())

    def _set(self, pruned: torch.Tensor, redundant: torch.Tensor) -> None:
        self.pruned, self.redundant, self._masks = pruned, redundant, None


@torch.no_grad()
def saliency(
    groups: Sequence[ChannelGroup], parameters: Mapping[str, nn.Parameter], importance: Importance, left: torch.Tensor
) -> torch.Tensor:
    """Importance of every channel, all groups in one row, from parameters x and their present gradients g = grad f(x).

    The paper's saliency scores of a channel's parameters x_g (the lower, the more redundant):

    - magnitude: ||x_g||
    - average magnitude: ||x_g|| / |g|, the number of its parameters
    - cosine similarity: 1 + cos(x_g, -grad_g). Going to zero means going along -x_g: where that agrees with the
      negative gradient, pruning descends and the score is near 0. (only_train_once 3.0.1 has the opposite sign.)
    - first-order Taylor: |x_g . grad_g|, the change of f when x_g is set to zero
    - second-order Taylor: (x_g . grad_g)^2 / 2, with the gradient's outer product for the Hessian

    Each score is divided by its Euclidean norm over the channels that are left, then weighted and summed.

    Args:
        left: bool `[total]`, channels not pruned yet.

    Returns:
        float64 `[total]` on the parameters' device. A parameter without gradient counts as one of gradient 0.
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

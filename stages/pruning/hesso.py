"""HESSO, the Hybrid Efficient Structured Sparse Optimizer (arXiv 2409.09085), around any torch optimizer.

The paper states it as an optimizer of its own with SGD or Adam inside. Here the base optimizer steps by itself and
HESSO acts around it, so that momentum, weight decay and Muon stay torch's. With nothing to prune it does nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.common.errors import UserError
from stages.common.params import Importance, Oto
from stages.pruning.groups import ChannelGroup, entries, zero_channels

KEPT_SHARE = 0.05
"""Of the channels of each group, at least this share (and at least one) stays: fewer would cut the network's flow."""


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
    """The pruner's fractions as steps of a training of `steps`.

    Raises:
        UserError: if there is not at least one step for each period.
    """
    start, end = round(pruner.start_fraction * steps), round(pruner.end_fraction * steps)
    length = (end - start) // pruner.pruning_periods
    if length < 1:
        raise UserError(
            f"{key}.pruning_periods = {pruner.pruning_periods}: only {end - start} of {steps} steps lie between"
            f" start_fraction {pruner.start_fraction} and end_fraction {pruner.end_fraction}; each period needs one:"
            " lower pruning_periods, or raise epochs or end_fraction"
        )
    return PruningSchedule(start, length, pruner.pruning_periods)


class Hesso:
    """Drives the least important channel groups to zero while the network trains (`training.constraint.Constraint`).

    Algorithm 1 of the paper: after a warm-up, each of P pruning periods picks the K/P groups of lowest saliency among
    those that are left as redundant, and over its T steps forgets them: after the base optimizer's step at step t of
    the period (counted from 0), their parameters are multiplied by (T - t - 1) / (T - t). The factors multiply up to
    a straight line that ends at exactly zero. Groups of earlier periods are kept at zero, whatever the optimizer's
    momentum does; all others follow the base optimizer alone (the paper's hybrid training).

    Args:
        network: its parameters are steered; `named_parameters` must hold every name in `groups`. The network may be
            moved to another device before the first step.
        groups: of which round(group_sparsity * all channels) are pruned in the end.
        steps: optimizer steps in the whole training.
        key: of the pruner in the params, for messages.

    Raises:
        UserError: if the periods do not fit into the steps, or the target leaves a group with too few channels.
    """

    def __init__(self, network: nn.Module, groups: Sequence[ChannelGroup], pruner: Oto, steps: int, key: str) -> None:
        parameters = dict(network.named_parameters())
        self.groups, self.importance = list(groups), pruner.importance
        self._parameters = {part.name: parameters[part.name] for group in groups for part in group.makes}
        self._channels = [group.channels for group in groups]
        total = sum(self._channels)
        self.target = round(pruner.group_sparsity * total)
        removable = [channels - max(1, math.ceil(KEPT_SHARE * channels)) for channels in self._channels]
        if self.target > sum(removable):
            most = math.floor(1000 * sum(removable) / total) / 1000
            raise UserError(
                f"{key}.group_sparsity = {pruner.group_sparsity}: at most {most} of this network's {total} channels can"
                f" go, since every layer keeps {KEPT_SHARE:.0%} of its channels and at least one"
            )
        self._removable = torch.tensor(removable)
        self._group_of = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(self._channels))
        self.schedule = pruning_schedule(pruner, steps, key) if self.target else PruningSchedule(0, 0, 0)
        self.pruned = torch.zeros(total, dtype=torch.bool)
        """Channels at zero for good, all groups in one row."""
        self.redundant = torch.zeros(total, dtype=torch.bool)
        """Channels that the present period is forgetting."""
        self._touched: tuple[list, list] | None = None

    def before_step(self, step: int) -> None:
        """At a period's first step, pick its redundant channels: only then are scores computed and the host waits."""
        schedule = self.schedule
        if schedule.start <= step < schedule.end and (step - schedule.start) % schedule.length == 0:
            period = (step - schedule.start) // schedule.length
            goal = self.target * (period + 1) // schedule.periods
            self._set(self.pruned, self._least_important(goal) & ~self.pruned)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Forget the redundant channels a little more; at a period's last step they are zero and stay so."""
        schedule = self.schedule
        if step < schedule.start or not self.target:
            return
        pruned, redundant = self._touched = self._touched or (self._rows(self.pruned), self._rows(self.redundant))
        for parameter, rows in pruned:
            parameter.index_fill_(0, rows, 0)
        if step >= schedule.end:
            return
        left = schedule.length - (step - schedule.start) % schedule.length
        for parameter, rows in redundant:
            if left == 1:
                parameter.index_fill_(0, rows, 0)
            else:
                parameter.index_copy_(0, rows, parameter.index_select(0, rows).mul_((left - 1) / left))
        if left == 1:
            self._set(self.pruned | self.redundant, torch.zeros_like(self.redundant))

    def project(self, network: nn.Module) -> None:
        """Zero the channels that are pruned for good in another copy of the network, in place."""
        if self.target:
            zero_channels(network, self.groups, self.pruned_channels())

    def met_after(self, step: int) -> bool:
        """True from the last period's last step on."""
        return step >= self.schedule.end - 1

    def pruned_channels(self) -> dict[str, torch.Tensor]:
        """For each group by name, bool `[channels]`."""
        return dict(zip((g.name for g in self.groups), self.pruned.split(self._channels), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"pruned": self.pruned.clone(), "redundant": self.redundant.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set(state["pruned"].cpu().clone(), state["redundant"].cpu().clone())

    def _set(self, pruned: torch.Tensor, redundant: torch.Tensor) -> None:
        self.pruned, self.redundant, self._touched = pruned, redundant, None

    def _rows(self, channels: torch.Tensor) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """The parameters that make the given channels, each with its rows, on its device."""
        found = []
        for group, chosen in zip(self.groups, channels.split(self._channels), strict=True):
            where = chosen.nonzero().flatten()
            if not len(where):
                continue
            for part in group.makes:
                parameter = self._parameters[part.name]
                found.append((parameter, entries(where, part.repeat).to(parameter.device)))
        return found

    def _least_important(self, count: int) -> torch.Tensor:
        """The `count` channels to be zero after this period, those that are zero already among them, bool `[total]`."""
        scores = saliency(self.groups, self._parameters, self.importance, left=~self.pruned).cpu()
        if not torch.isfinite(scores).all():
            raise UserError(
                "the importance of some channels is NaN or infinite: lower the learning rate; nothing was saved"
            )
        scores[self.pruned] = -torch.inf
        by_score = scores.argsort(stable=True)
        by_group = by_score[self._group_of[by_score].argsort(stable=True)]
        first = torch.tensor([0, *self._channels[:-1]]).cumsum(0)
        rank = torch.empty_like(by_group)  # within its own group, from the least important on
        rank[by_group] = torch.arange(len(by_group)) - first[self._group_of[by_group]]
        scores[rank >= self._removable[self._group_of]] = torch.inf
        chosen = torch.zeros_like(self.pruned)
        chosen[scores.argsort(stable=True)[:count]] = True
        return chosen


@torch.no_grad()
def saliency(
    groups: Sequence[ChannelGroup], parameters: dict[str, nn.Parameter], importance: Importance, left: torch.Tensor
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

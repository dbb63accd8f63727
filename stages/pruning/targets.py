"""The choice of channels to remove: the least important ones, until the pruner's one target is exactly met."""

import bisect
import math
from collections.abc import Callable, Sequence

import torch

from stages.common.errors import UserError
from stages.params.pruners import Structured
from stages.pruning.costs import Costs
from stages.pruning.groups import ChannelGroup

KEPT_FRACTION = 0.05
"""Each group keeps at least this fraction of its channels, and at least one: fewer would block the network."""
ROUNDING = 1e-9
"""A reduction still meets the target if it falls short by this fraction of the dense cost, float64's noise."""


def choose_channels(
    scores: torch.Tensor,
    groups: Sequence[ChannelGroup],
    costs: Costs,
    pruner: Structured,
    *,
    fraction: float = 1.0,
    pruned: torch.Tensor | None = None,
    key: str,
) -> torch.Tensor:
    """Choose the least important channels, so that `fraction` of the pruner's target is met.

    Within each group channels go in order of score, in units: one channel, or with `divisible_by` as many as lead to
    the next multiple. Over all groups the units go in order of their mean score, ties in the network's order, so that
    the result is the same in every run. `group_sparsity` stops where the number of channels is nearest to
    round(fraction x target x all channels); the other two targets stop as soon as the exact reduction reaches
    fraction x target. Every group keeps max(minimum_width, 5 % of its width) channels, or all where it has no more.

    Args:
        scores: Importance of each of C channels, all groups in one row, `[C]`. Scores of `pruned` channels are ignored.
        costs: The dense network's costs, for the same groups.
        fraction: In (0, 1].
        pruned: bool `[C]`, channels that are pruned already: they stay so, and count.
        key: The pruner's place in params.yaml, for messages.

    Returns:
        bool `[C]` on the CPU.

    Raises:
        UserError: If a score is NaN or infinite, or no choice of channels meets the whole target.
    """
    check_target(groups, costs, pruner, key)
    scores = scores.detach().cpu().double()
    pruned = torch.zeros(len(scores), dtype=torch.bool) if pruned is None else pruned.cpu()
    if not torch.isfinite(scores[~pruned]).all():
        raise UserError(
            f"{key}: the importance of some channels is NaN or infinite, since weights or gradients are: lower"
            f" {key}.learning_rate_factor; nothing was saved"
        )
    widths = torch.tensor([group.channels for group in groups])
    lows = least_widths(widths, pruner)
    group_of = torch.repeat_interleave(torch.arange(len(groups)), widths)
    first = widths.cumsum(0) - widths
    scores = torch.where(pruned, -torch.inf, scores)

    # Channels in order of group, then score: a channel's rank in its group determines its unit.
    by_score = scores.argsort(stable=True)
    order = by_score[group_of[by_score].argsort(stable=True)]
    group = group_of[order]
    rank = torch.arange(len(order)) - first[group]
    whole = widths - torch.div(widths, pruner.divisible_by, rounding_mode="floor") * pruner.divisible_by
    whole = torch.where(whole == 0, pruner.divisible_by, whole)  # size of each group's first unit
    behind = torch.div(rank - whole[group], pruner.divisible_by, rounding_mode="floor")
    unit_in_group = torch.where(rank < whole[group], 0, behind + 1)
    may_go = rank < (widths - lows)[group]
    order, group, unit_in_group = order[may_go], group[may_go], unit_in_group[may_go]

    _, unit_of, sizes = torch.unique_consecutive(
        group * (1 + len(scores)) + unit_in_group, return_inverse=True, return_counts=True
    )
    last = sizes.cumsum(0) - 1
    means = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, unit_of, scores[order]) / sizes
    # Rounded means of equal scores may differ: clamped to their extremes, no unit overtakes one of its own group.
    means = means.clamp(scores[order[last - sizes + 1]], scores[order[last]])
    units, owner = means.argsort(stable=True), group[last]
    count = _units_needed(units, sizes, owner, widths, costs, pruner, fraction)
    goes = torch.zeros(len(sizes), dtype=torch.bool).index_fill_(0, units[:count], True)
    chosen = pruned.clone()
    chosen[order[goes[unit_of]]] = True
    return chosen


def check_target(groups: Sequence[ChannelGroup], costs: Costs, pruner: Structured, key: str) -> None:
    """Refuse, before any training, a target that no choice of channels meets.

    Raises:
        UserError: With the nearest target that can be met.
    """
    [(name, target)] = pruner.target.items()
    widths = torch.tensor([group.channels for group in groups])
    lows = least_widths(widths, pruner)
    total = int(widths.sum())
    if name == "group_sparsity":
        free = int((widths - lows).sum())
        most, what, met = free / total, f"{total} channels", round(target * total) <= free
    else:
        count, dense, unit = _cost_of(name, costs)
        most, what = 1 - float(count(lows)) / dense, f"{dense:,} {unit}"
        met = target <= most + ROUNDING
    if not met:
        raise UserError(
            f"{key}.{name} = {target}: at most {rounded_down(most)} of this network's {what} can go, since every layer"
            f" keeps {what_every_layer_keeps(pruner)}"
        )


def rounded_down(fraction: float) -> float:
    """Round to three digits, such that the result is still accepted as a target."""
    return math.floor(1000 * (fraction + ROUNDING)) / 1000


def what_every_layer_keeps(pruner: Structured) -> str:
    """Describe `least_widths`, for messages."""
    floor = f"{100 * KEPT_FRACTION:.0f} % of its channels and at least {pruner.minimum_width}"
    floor += f", and a multiple of {pruner.divisible_by} where it is cut" if pruner.divisible_by > 1 else ""
    return floor + (", and those in exclude keep all" if pruner.exclude else "")


def least_widths(widths: torch.Tensor, pruner: Structured) -> torch.Tensor:
    """The fewest channels that each group may keep, int64 `[G]`."""
    floor = (KEPT_FRACTION * widths.double() - ROUNDING).ceil().long().clamp_min(pruner.minimum_width)
    multiple = torch.div(floor + pruner.divisible_by - 1, pruner.divisible_by, rounding_mode="floor")
    return torch.minimum(multiple * pruner.divisible_by, widths)


def _units_needed(
    units: torch.Tensor,
    sizes: torch.Tensor,
    owner: torch.Tensor,
    widths: torch.Tensor,
    costs: Costs,
    pruner: Structured,
    fraction: float,
) -> int:
    """The number of units, in the order given, that meet `fraction` of the target."""
    [(name, target)] = pruner.target.items()
    removed = torch.cat([torch.zeros(1, dtype=torch.int64), sizes[units].cumsum(0)])  # after 0, 1, ... units
    if name == "group_sparsity":
        goal = round(fraction * target * int(widths.sum()))
        return int((removed - goal).abs().argmin())  # of two that are equally near, the fewer channels
    count, dense, _ = _cost_of(name, costs)

    def suffices(some: int) -> bool:
        gone = torch.zeros_like(widths).index_add_(0, owner[units[:some]], sizes[units[:some]])
        return dense - float(count(widths - gone)) >= (fraction * target - ROUNDING) * dense

    return bisect.bisect_left(range(len(units)), True, key=suffices)  # each further unit costs something


def _cost_of(target: str, costs: Costs) -> tuple[Callable[[torch.Tensor], torch.Tensor], int, str]:
    """The cost that a target reduces: its function of the channels left, its dense value, and its unit."""
    if target == "params_reduction":
        return costs.params, costs.params_dense, "parameters"
    return costs.macs, costs.macs_dense, "MACs"

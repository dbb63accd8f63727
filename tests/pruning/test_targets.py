"""The choice of channels against a brute-force search."""

import itertools
import math

import pytest
import torch
from torch import nn
from toy_groups import CHANNELS, GROUPS, oto, toy_costs

from stages.common.errors import UserError
from stages.params.pruners import Oto
from stages.pruning.costs import costs_of
from stages.pruning.groups import ChannelGroup, Slice
from stages.pruning.targets import choose_channels

WIDTHS = [group.channels for group in GROUPS]
TARGETS = ["group_sparsity", "params_reduction", "macs_reduction"]


def choose(scores, pruner, **more):
    return choose_channels(scores, GROUPS, toy_costs(), pruner, key="pruners.toy", **more)


def random_scores(seed):
    return torch.rand(CHANNELS, generator=torch.Generator().manual_seed(seed))


def kept_of(chosen):
    return torch.tensor([int((~part).sum()) for part in chosen.split(WIDTHS)])


def reduction(name, kept):
    costs = toy_costs()
    match name:
        case "group_sparsity":
            return 1 - int(kept.sum()) / CHANNELS
        case "params_reduction":
            return 1 - costs.params(kept).item() / costs.params_dense
        case "macs_reduction":
            return 1 - costs.macs(kept).item() / costs.macs_dense


def brute_force(scores, pruner, fraction=1.0):
    """Channels taken away one unit at a time, the unit of least mean score among those next in line, in plain loops."""
    [(name, target)] = pruner.target.items()
    d = pruner.divisible_by
    left, offset = [], 0
    for width in WIDTHS:
        left.append(sorted(range(offset, offset + width), key=lambda c: (scores[c].item(), c)))
        offset += width
    outcomes = [set()]
    while True:
        best = None
        for g, channels in enumerate(left):
            size = len(channels) % d or d
            floor = max(pruner.minimum_width, math.ceil(WIDTHS[g] / 20))
            if len(channels) - size < floor:
                continue
            mean = sum(scores[c].item() for c in channels[:size]) / size
            if best is None or mean < best[0]:
                best = mean, g, size
        if best is None:
            break
        _, g, size = best
        outcomes.append(outcomes[-1] | set(left[g][:size]))
        left[g] = left[g][size:]
    if name == "group_sparsity":
        goal = round(fraction * target * CHANNELS)
        return None if goal > len(outcomes[-1]) else min(outcomes, key=lambda out: abs(len(out) - goal))
    for out in outcomes:
        gone = torch.zeros(CHANNELS, dtype=torch.bool)
        gone[list(out)] = True
        if reduction(name, kept_of(gone)) >= fraction * target - 1e-12:
            return out
    return None


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("minimum_width", "divisible_by"), [(1, 1), (3, 1), (1, 4), (5, 2), (6, 4)])
def test_choice_is_that_of_a_brute_force_search(name, minimum_width, divisible_by):
    changed = 0
    for seed, target, fraction in itertools.product(range(3), (0.1, 0.3, 0.45), (1.0, 0.4)):
        pruner = oto(**{name: target}, minimum_width=minimum_width, divisible_by=divisible_by)
        scores = random_scores(seed)
        expected = brute_force(scores.double(), pruner, fraction)
        if brute_force(scores.double(), pruner) is None:
            with pytest.raises(UserError, match="at most"):
                choose(scores, pruner, fraction=fraction)
            continue
        assert set(choose(scores, pruner, fraction=fraction).nonzero().flatten().tolist()) == expected
        changed += len(expected) > 0
    assert changed >= 3


def test_equal_scores_keep_the_order_of_the_network_and_allowed_widths():
    for value in (0.0, 0.1, 1 / 3):  # sums of 0.1 and 1/3 over units of different size round differently
        chosen = choose(torch.full((CHANNELS,), value), oto(group_sparsity=0.25, divisible_by=4))
        assert kept_of(chosen).tolist() == [4, 6, 12]  # 10 to 8 to 4, nearest to 7 gone
        assert chosen.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", TARGETS)
def test_pruned_channels_stay_pruned_and_count(name):
    pruner = oto(**{name: 0.5}, divisible_by=2)
    first = choose(random_scores(0), pruner, fraction=0.5)
    scores = random_scores(1).masked_fill(first, torch.nan)  # nobody looks at them
    second = choose(scores, pruner, fraction=1.0, pruned=first)
    assert (second | ~first).all()
    assert second.sum() > first.sum()
    assert reduction(name, kept_of(second)) == pytest.approx(0.5, abs=0.08)
    again = choose(scores, pruner, fraction=0.5, pruned=second)  # less than is pruned already: nothing comes back
    assert torch.equal(again, second)


@pytest.mark.parametrize(
    ("target", "settings", "nearest"),
    [
        ("group_sparsity", {}, "0.892 of this network's 28 channels"),
        ("group_sparsity", {"minimum_width": 4}, "0.571 of this network's 28 channels"),
        ("group_sparsity", {"divisible_by": 8}, "0.214 of this network's 28 channels"),
        ("params_reduction", {}, None),
        ("macs_reduction", {"minimum_width": 2}, None),
    ],
)
def test_target_that_cannot_be_met_is_refused_with_the_nearest_that_can(target, settings, nearest):
    with pytest.raises(UserError, match=rf"^pruners\.toy\.{target} = 0\.995: at most ") as refused:
        choose(random_scores(0), oto(**{target: 0.995}, **settings))
    message = str(refused.value)
    assert nearest is None or nearest in message
    most = float(message.split("at most ")[1].split()[0])
    chosen = choose(random_scores(0), oto(**{target: most}, **settings))  # it is met,
    assert reduction(target, kept_of(chosen)) >= most
    with pytest.raises(UserError, match="at most"):  # and no higher one is
        choose(random_scores(0), oto(**{target: most + (0.001 if target != "group_sparsity" else 0.02)}, **settings))


def test_scores_that_are_not_finite_are_refused():
    scores = random_scores(0)
    scores[3] = torch.nan
    with pytest.raises(UserError, match=r"pruners\.toy: the importance of some channels is NaN or infinite"):
        choose(scores, oto(group_sparsity=0.5))


def test_a_twentieth_of_a_wide_layer_stays():
    wide = [ChannelGroup("0", 200, (Slice("0.weight", 0),), (Slice("1.weight", 1),), ())]
    network = nn.Sequential(nn.Conv2d(3, 200, 1), nn.Conv2d(200, 2, 1))
    costs = costs_of(network, wide, 4)
    most = Oto(method="oto", epochs=1, learning_rate_factor=1, group_sparsity=0.95)
    assert int(choose_channels(torch.rand(200), wide, costs, most, key="pruners.toy").sum()) == 190
    more = most.model_copy(update={"group_sparsity": 0.96})
    with pytest.raises(UserError, match="5 % of its channels"):
        choose_channels(torch.rand(200), wide, costs, more, key="pruners.toy")

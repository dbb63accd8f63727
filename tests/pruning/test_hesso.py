"""HESSO against a reference that follows the paper channel by channel, in loops."""

import copy
import math

import pytest
import torch
from torch import nn
from toy_groups import (
    COSINE,
    GROUPS,
    OPTIMIZERS,
    STEPS,
    entries_of,
    gradients_of,
    norms,
    optimizer_of,
    oto,
    rows_of,
    run,
    toy,
    toy_costs,
)

from stages.params.pruners import ALL_SCORES, Importance, Oto
from stages.pruning.hesso import Hesso


class Reference:
    """Algorithm 1 and the saliency scores of arXiv 2409.09085, one channel at a time, in plain floats."""

    def __init__(self, network: nn.Module, settings: Oto) -> None:
        self.network, self.settings = network, settings
        self.start = round(settings.start_fraction * STEPS)
        self.length = (round(settings.end_fraction * STEPS) - self.start) // settings.pruning_periods
        self.all = [(g, c) for g in range(len(GROUPS)) for c in range(GROUPS[g].channels)]
        self.pruned, self.redundant = [], []

    def scores(self) -> dict[tuple[int, int], float]:
        raw = {}
        for g, c in self.all:
            if (g, c) in self.pruned:
                continue
            x, grad = (part(self.network, GROUPS[g], c).tolist() for part in (entries_of, gradients_of))
            norm, grad_norm = math.hypot(*x), math.hypot(*grad)
            product = sum(a * b for a, b in zip(x, grad, strict=True))
            raw[g, c] = [norm, norm / len(x), 1 - product / (norm * grad_norm), abs(product), product**2 / 2]
        weights = list(self.settings.importance.model_dump().values())
        lengths = [math.hypot(*(scores[i] for scores in raw.values())) for i in range(5)]
        return {
            key: sum(w * s / length for w, s, length in zip(weights, scores, lengths, strict=True))
            for key, scores in raw.items()
        }

    def before_step(self, step: int) -> None:
        period, t = divmod(step - self.start, self.length)
        if not (0 <= period < self.settings.pruning_periods and t == 0):
            return
        fraction = (period + 1) / self.settings.pruning_periods
        wanted = round(fraction * self.settings.group_sparsity * len(self.all)) - len(self.pruned)
        scores = self.scores()
        for g, c in sorted(scores, key=scores.get):
            if len(self.redundant) == wanted:
                break
            gone = sum(other == g for other, _ in self.pruned + self.redundant)
            if GROUPS[g].channels - gone > max(1, math.ceil(0.05 * GROUPS[g].channels)):
                self.redundant.append((g, c))

    def after_step(self, step: int) -> None:
        period, t = divmod(step - self.start, self.length)
        with torch.no_grad():
            for g, c in self.redundant:
                for parameter, rows in rows_of(self.network, GROUPS[g], c):
                    parameter[rows] *= (self.length - t - 1) / (self.length - t)
            if t == self.length - 1 and period < self.settings.pruning_periods:
                self.pruned += self.redundant
                self.redundant = []
            for g, c in self.pruned:
                for parameter, rows in rows_of(self.network, GROUPS[g], c):
                    parameter[rows] = 0


def hesso_for(network: nn.Module, settings: Oto) -> Hesso:
    return Hesso(network, GROUPS, toy_costs(), settings, STEPS, "pruners.toy")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sparsity", [0.5, 0.85])
@pytest.mark.parametrize("importance", [ALL_SCORES, COSINE])
def test_trajectory_is_that_of_the_paper_followed_channel_by_channel(optimizer, sparsity, importance):
    # float64: Adam blows the rounding noise of gradients that are 0 up to whole steps
    network, settings = toy().double(), oto(group_sparsity=sparsity, importance=importance)
    twin = copy.deepcopy(network)
    hesso, reference = hesso_for(network, settings), Reference(twin, settings)
    one, other = optimizer_of(optimizer, network), optimizer_of(optimizer, twin)
    for step in range(STEPS):
        run(network, one, hesso, [step])
        run(twin, other, reference, [step])
        for mine, theirs in zip(network.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-7, msg=f"step {step}")
    offsets = [0, 10, 16]
    assert hesso.pruned.nonzero().flatten().tolist() == sorted(offsets[g] + c for g, c in reference.pruned)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_channels_are_exactly_zero_at_the_end_of_each_period_and_stay_so(optimizer):
    network = toy()
    hesso = hesso_for(network, oto())
    steps = optimizer_of(optimizer, network)
    schedule, zeros = hesso.schedule, []
    assert (schedule.start, schedule.length, schedule.end) == (4, 3, 13)
    for step in range(STEPS):
        run(network, steps, hesso, [step])
        zeros.append(int((norms(network) == 0).sum()))
        assert hesso.met_after(step) == (step >= 12)
    assert zeros == [0] * 6 + [5] * 3 + [9] * 3 + [14] * 8  # 14 of 28 in three periods
    assert torch.equal(norms(network) == 0, hesso.pruned)


def test_forgetting_is_progressive():
    network = toy()
    still = torch.optim.SGD(network.parameters(), lr=0.0)
    hesso = hesso_for(network, oto(pruning_periods=1, end_fraction=0.6))
    before = norms(network)
    left = []
    for step in range(12):
        run(network, still, hesso, [step])
        if step >= 4:
            chosen = hesso.redundant | hesso.pruned
            left.append(float((norms(network) / before)[chosen].mean()))
    assert left == pytest.approx([1 - (t + 1) / 8 for t in range(8)], abs=1e-5)


def test_every_group_keeps_a_fraction_of_its_channels():
    network = toy()
    with torch.no_grad():
        network[6].weight.mul_(1e-3)
        network[6].bias.mul_(1e-3)  # the least important by far: all twelve would go
    hesso = hesso_for(network, oto(importance=Importance(magnitude=1.0)))
    run(network, torch.optim.SGD(network.parameters(), lr=1e-6), hesso)
    assert int(hesso.pruned_channels()["6"].sum()) == 11
    assert int(hesso.pruned.sum()) == 14

"""DHSPG against a reference that follows the paper channel by channel, in loops."""

import copy

import pytest
import torch
from torch import nn
from toy_groups import (
    CHANNELS,
    GROUPS,
    OPTIMIZERS,
    STEPS,
    backward,
    entries_of,
    norms,
    optimizer_of,
    rate,
    rows_of,
    run,
    steering_of,
    toy,
)

from stages.params.pruners import ALL_SCORES
from stages.pruning.dhspg import Products, _Phase, penalize
from stages.pruning.steering import saliency

ALL = [(g, c) for g, group in enumerate(GROUPS) for c in range(group.channels)]


class Reference:
    """Algorithm 3 of arXiv 2303.06862, with the forgetting at its end, one channel at a time."""

    def __init__(
        self, network: nn.Module, penalty: float = 1e-3, penalty_limit: float = 10.0, half_space: float = 0.0
    ) -> None:
        self.network, self.limits, self.half_space = network, (penalty, penalty_limit), half_space
        self.redundant, self.zero, self.before = [], set(), {}
        self.projected = self.adjusted = 0
        self.start, self.end, self.forgetting = 4, 16, 3

    def before_step(self, step: int) -> None:
        if step == self.start:
            parameters = dict(self.network.named_parameters())
            every = torch.ones(CHANNELS, dtype=torch.bool)
            scores = saliency(GROUPS, parameters, ALL_SCORES, every).tolist()
            self.redundant = [ALL[i] for i in sorted(range(CHANNELS), key=scores.__getitem__)[: CHANNELS // 2]]
        self.before = {(g, c): entries_of(self.network, GROUPS[g], c) for g, c in self.redundant}

    def after_step(self, step: int) -> None:
        if step < self.start:
            return
        for g, c in self.redundant:
            x, moved = self.before[g, c], entries_of(self.network, GROUPS[g], c)
            if (g, c) in self.zero or step >= self.end:
                self.put(g, c, torch.zeros_like(x))
                continue
            alpha, limits = rate(step), self.limits
            d, direction = (x - moved) / alpha, x / x.norm()
            cosine = float(d @ direction / d.norm())
            lamb = limits[0]
            if cosine < 0:
                least, most = -cosine * d.norm(), -d.norm() / cosine
                lamb = min(max(1.1 * least, limits[0]), limits[1])
                self.adjusted += lamb not in limits
                if lamb >= most:
                    lamb = (least + most) / 2
            trial = moved - alpha * lamb * direction
            if trial @ x < self.half_space * (x @ x):
                self.zero.add((g, c))
                self.projected += 1
                trial = torch.zeros_like(x)
            left = self.end - step
            if left <= self.forgetting:
                trial = trial * ((left - 1) / left)
            self.put(g, c, trial)

    def put(self, g: int, c: int, entries: torch.Tensor) -> None:
        places = rows_of(self.network, GROUPS[g], c)
        with torch.no_grad():
            for (p, rows), part in zip(places, entries.split([p[rows].numel() for p, rows in places]), strict=True):
                p[rows] = part.view_as(p[rows]).to(p)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "changes", [{}, {"penalty": 3.0}, {"penalty": 3.0, "half_space": 0.98}, {"penalty": 1e-3, "penalty_limit": 0.05}]
)
def test_trajectory_is_that_of_the_paper_followed_channel_by_channel(optimizer, changes):
    # float64: Adam blows the rounding noise of gradients that are 0 up to whole steps
    network = toy().double()
    twin = copy.deepcopy(network)
    dhspg, reference = steering_of("dhspg", network, **changes), Reference(twin, **changes)
    one, other = optimizer_of(optimizer, network), optimizer_of(optimizer, twin)
    for step in range(STEPS):
        run(network, one, dhspg, [step])
        run(twin, other, reference, [step])
        for mine, theirs in zip(network.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-7, msg=f"step {step}")
        zero = torch.tensor([place in reference.zero for place in ALL])
        assert dhspg.channels_projected == (reference.projected if step >= 15 else 0)
        assert torch.equal(dhspg.pruned, zero if step < 15 else norms(twin) == 0)
    assert dhspg.redundant.nonzero().flatten().tolist() == sorted(ALL.index(place) for place in reference.redundant)
    if "half_space" in changes:
        assert reference.projected > 0
    if not changes:
        assert reference.adjusted > 10


def test_adjusted_direction_descends_for_the_loss_and_for_the_norm():
    generator = torch.Generator().manual_seed(0)
    x, step = torch.randn(2, 200, 5, generator=generator, dtype=torch.float64)
    products = Products((x * x).sum(1), (x * step).sum(1), (step * step).sum(1))
    shrink, _ = penalize(products, 1.0, 1e-9, 1e9, 0.0)
    direction = step - shrink[:, None] * x
    growing = products.xs > 0
    assert 50 < growing.sum() < 150
    assert ((direction * x).sum(1) < 0).all()  # towards zero
    assert ((direction * step).sum(1) > 0).all()  # and still along the step that descends for the loss
    unadjusted = step - 1e-9 * x
    assert ((unadjusted * x).sum(1) >= 0)[growing].all()


def test_penalty_stays_within_its_limits():
    products = Products(*(torch.tensor(v, dtype=torch.float64) for v in ([4.0] * 3, [2.0, 1e-6, -2.0], [1e6] * 3)))
    shrink, projected = penalize(products, 0.1, 0.5, 3.0, 0.0)
    # lengths: alpha lambda = 1.1 x 2 / 2 over the limit of 0.3; under 0.05; any will do
    torch.testing.assert_close(shrink * 2, torch.tensor([0.3, 0.05, 0.05], dtype=torch.float64))
    assert not projected.any()


def test_half_space_projection_is_strict():
    xx, xs = torch.tensor([1.0, 1.0, 1.0, 0.0]).double(), torch.tensor([-1.0, -1.1, -0.4, 0.0]).double()
    products = Products(xx, xs, torch.ones(4).double())
    _, projected = penalize(products, 0.0, 1.0, 1.0, 0.0)
    assert projected.tolist() == [False, True, False, True]  # at 0 not yet; a channel of zeros is zero
    _, projected = penalize(products, 0.0, 1.0, 1.0, 0.7)
    assert projected.tolist() == [True, True, True, True]


@pytest.mark.parametrize("channels_last", [False, True])
def test_both_layouts_of_the_parameters_compute_and_move_alike(channels_last):
    redundant = torch.rand(CHANNELS, generator=torch.Generator().manual_seed(0)) < 0.5
    redundant[:10] = False  # a group that is not touched
    outcomes = []
    for flat in (False, True):
        network = toy().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        phase = _Phase(dict(network.named_parameters()), GROUPS, redundant, flat=flat)
        for _ in range(2):  # the second time from what the first one left
            backward(network, 0)
            torch.optim.SGD(network.parameters(), lr=0.1).step()
            before_move = copy.deepcopy(network)
            products = torch.stack(phase.products(), 1)[redundant]
            shrink, kept = torch.linspace(0, 0.5, CHANNELS).double(), torch.ones(CHANNELS).double()
            kept[redundant.nonzero()[:3]] = 0
            phase.move(shrink, kept)
        assert torch.equal(norms(network)[~redundant], norms(before_move)[~redundant])
        assert torch.equal(norms(network) == 0, redundant & (kept == 0))
        outcomes.append((products, *network.parameters()))
    for rows, laid in zip(*outcomes, strict=True):
        torch.testing.assert_close(rows, laid)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("penalty", [1e-3, 5.0])
def test_redundant_channels_are_exactly_zero_at_the_end_of_the_phase_and_stay_so(optimizer, penalty):
    network = toy()
    dhspg = steering_of("dhspg", network, penalty=penalty)
    steps = optimizer_of(optimizer, network)
    chosen = []
    for step in range(STEPS):
        zero = dhspg.pruned
        run(network, steps, dhspg, [step])
        assert torch.equal(norms(network) == 0, dhspg.pruned)
        assert (dhspg.pruned | ~zero).all()
        assert dhspg.met_after(step) == (step >= 15) == (int(dhspg.pruned.sum()) == 14)
        chosen.append(dhspg.redundant)
    assert not chosen[3].any()
    assert all(torch.equal(chosen[4], later) for later in chosen[4:])
    assert torch.equal(dhspg.pruned, dhspg.redundant)


def test_higher_penalty_projects_more_channels_before_the_forgetting():
    zeros = []
    for penalty in (1e-3, 40.0):
        network = toy()
        dhspg = steering_of("dhspg", network, penalty=penalty, penalty_limit=100.0)
        run(network, optimizer_of("sgd", network), dhspg, range(13))
        zeros.append(int(dhspg.pruned.sum()))
    assert zeros[0] < zeros[1]

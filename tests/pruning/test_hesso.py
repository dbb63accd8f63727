"""HESSO against a reference that follows the paper group by group, in loops."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from toy_groups import GROUPS, OPTIMIZERS, STEPS, backward, norms, optimizer_of, oto, rows_of, run, toy, toy_costs

from stages.common.errors import UserError
from stages.params.pruners import ALL_SCORES, Importance, Oto
from stages.pruning.hesso import Hesso, pruning_schedule, saliency

COSINE = Importance(**{name: float(name == "cosine_similarity") for name in Importance.model_fields})


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
            x, grad = [], []
            for parameter, rows in rows_of(self.network, GROUPS[g], c):
                x += parameter.detach()[rows].double().flatten().tolist()
                grad += parameter.grad[rows].double().flatten().tolist()
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
        share = (period + 1) / self.settings.pruning_periods
        wanted = round(share * self.settings.group_sparsity * len(self.all)) - len(self.pruned)
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
def test_trajectory_is_that_of_the_paper_followed_group_by_group(optimizer, sparsity, importance):
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


@pytest.mark.parametrize("only", list(Importance.model_fields))
def test_each_score_alone_is_the_papers_formula(only):
    network = toy()
    backward(network, 0)
    importance = Importance(**{name: float(name == only) for name in Importance.model_fields})
    parameters = dict(network.named_parameters())
    found = saliency(GROUPS, parameters, importance, left=torch.ones(28, dtype=torch.bool))
    expected = Reference(network, oto(importance=importance)).scores()
    torch.testing.assert_close(found, torch.tensor(list(expected.values()), dtype=torch.float64), atol=1e-7, rtol=1e-4)


def test_channel_that_gradient_descent_is_shrinking_counts_as_redundant():
    network = toy()
    for parameter in network.parameters():
        parameter.grad = parameter.detach().clone()  # descent goes along -x, to zero
    parameters, left = dict(network.named_parameters()), torch.ones(28, dtype=torch.bool)
    shrinking = saliency(GROUPS, parameters, COSINE, left)
    parameters["6.weight"].grad.neg_()
    parameters["6.bias"].grad.neg_()
    growing = saliency(GROUPS, parameters, COSINE, left)
    assert shrinking.abs().max() < 1
    assert growing[16:].min() > growing[:16].max()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zero_target_leaves_the_base_optimizers_trajectory_bit_for_bit(optimizer):
    network = toy()
    twin = copy.deepcopy(network)
    run(network, optimizer_of(optimizer, network), hesso_for(network, oto(group_sparsity=0.0)))
    run(twin, optimizer_of(optimizer, twin), None)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), twin.parameters(), strict=True))


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
    shares = []
    for step in range(12):
        run(network, still, hesso, [step])
        if step >= 4:
            chosen = hesso.redundant | hesso.pruned
            shares.append(float((norms(network) / before)[chosen].mean()))
    assert shares == pytest.approx([1 - (t + 1) / 8 for t in range(8)], abs=1e-5)


def test_every_group_keeps_a_share_of_its_channels():
    network = toy()
    with torch.no_grad():
        network[6].weight.mul_(1e-3)
        network[6].bias.mul_(1e-3)  # the least important by far: all twelve would go
    settings = oto(
        importance=Importance(
            magnitude=1.0, average_magnitude=0, cosine_similarity=0, taylor_first_order=0, taylor_second_order=0
        )
    )
    hesso = hesso_for(network, settings)
    run(network, torch.optim.SGD(network.parameters(), lr=1e-6), hesso)
    assert int(hesso.pruned_channels()["6"].sum()) == 11
    assert int(hesso.pruned.sum()) == 14


@pytest.mark.parametrize("stop", [6, 7, 13, 16])
def test_training_resumed_in_mid_period_ends_bit_for_bit_the_same(stop):
    network = toy()
    optimizer = optimizer_of("adamw", network)
    hesso = hesso_for(network, oto())
    run(network, optimizer, hesso, range(stop))
    saved = io.BytesIO()
    torch.save([network.state_dict(), optimizer.state_dict(), hesso.state_dict()], saved)
    run(network, optimizer, hesso, range(stop, STEPS))

    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    resumed = toy()
    optimizer = optimizer_of("adamw", resumed)
    again = hesso_for(resumed, oto())
    for part, state in zip((resumed, optimizer, again), states, strict=True):
        part.load_state_dict(state)
    run(resumed, optimizer, again, range(stop, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), resumed.parameters(), strict=True))
    assert torch.equal(hesso.pruned, again.pruned)


def test_projection_zeroes_the_pruned_channels_of_another_copy():
    network = toy()
    average = copy.deepcopy(network)
    hesso = hesso_for(network, oto())
    run(network, optimizer_of("sgd", network), hesso)
    untouched = norms(average)
    hesso.project(average)
    assert torch.equal(norms(average) == 0, hesso.pruned)
    assert torch.equal(norms(average)[~hesso.pruned], untouched[~hesso.pruned])


def test_parameters_in_channels_last_memory_are_pruned_in_place():
    network = toy().to(memory_format=torch.channels_last)
    weight = network[3].weight
    address = weight.data_ptr()
    hesso = hesso_for(network, oto())
    run(network, optimizer_of("sgd", network), hesso)
    assert network[3].weight is weight
    assert weight.data_ptr() == address
    assert torch.equal(norms(network) == 0, hesso.pruned)


def test_periods_that_do_not_fit_are_refused_with_the_key():
    with pytest.raises(UserError, match=r"pruners\.toy\.pruning_periods = 30: only 9 of 20 steps") as error:
        pruning_schedule(oto(pruning_periods=30, epochs=10), STEPS, "pruners.toy")
    assert "lower pruning_periods or finetune.batch_size (steps in an epoch: 2)" in str(error.value)


def test_target_that_would_empty_a_layer_is_refused_with_the_nearest_that_can_be_met():
    with pytest.raises(UserError, match=r"pruners\.toy\.group_sparsity = 0\.95: at most 0\.892 of this network's 28"):
        hesso_for(toy(), oto(group_sparsity=0.95))


def test_gradients_that_are_not_finite_are_refused():
    network = toy()
    hesso = hesso_for(network, oto())
    backward(network, 0)
    network[0].weight.grad[0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        hesso.before_step(4)

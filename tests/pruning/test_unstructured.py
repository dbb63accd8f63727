import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from stages.common.errors import UserError
from stages.params.pruners import Unstructured
from stages.pruning import unstructured
from stages.pruning.unstructured import KeepZeros, left_dense, prunable_weights, sparsities, sparsity_of

EMPTIES_5 = r"^pruners\.l1\.sparsity = 0\.8: leaves no weight in 5: lower it, or set pruners\.l1\.scope: layer"
zeros_of = functools.partial(unstructured.zeros_of, key="pruners.l1")
methods = pytest.mark.parametrize("method", ["l1_unstructured", "random_unstructured"])
scopes = pytest.mark.parametrize("scope", ["global", "layer"])


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 5)
    )


def pruner(method="l1_unstructured", sparsity=0.6, scope="global", **more) -> Unstructured:
    return Unstructured(method=method, sparsity=sparsity, scope=scope, epochs=1, learning_rate_factor=1.0, **more)


def gradual(**more) -> Unstructured:
    """Four pruning_periods over steps 2 to 10 of 20: after 4, 6, 8 and 10 steps."""
    return pruner(**{"schedule": "gradual", "start_fraction": 0.1, "end_fraction": 0.5, "pruning_periods": 4} | more)


def train_steps(network: nn.Module, keep: KeepZeros, steps: range, optimizer: torch.optim.Optimizer | None = None):
    """Random steps, each with its own seed: yields the step after each."""
    optimizer = optimizer or torch.optim.AdamW(network.parameters(), lr=0.05, weight_decay=0.1)
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        network(torch.randn(4, 3, 6, 6)).square().mean().backward()
        keep.before_step(step)
        optimizer.step()
        keep.after_step(step)
        yield step


@methods
@scopes
def test_exactly_the_given_fraction_of_weights_is_chosen(method, scope):
    network = toy()
    zeros = zeros_of(network, pruner(method, 0.37, scope), seed=3)
    assert list(zeros) == ["0.weight", "3.weight", "5.weight"]
    if scope == "layer":
        assert all(int(z.sum()) == round(0.37 * z.numel()) for z in zeros.values())
    else:
        assert sum(int(z.sum()) for z in zeros.values()) == round(0.37 * sum(z.numel() for z in zeros.values()))


def test_global_choice_is_that_of_torchs_own_pruning_and_leaves_the_network_as_it_is():
    network = toy()
    before = copy.deepcopy(network.state_dict())
    zeros = zeros_of(network, pruner(), seed=0)
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())
    theirs = copy.deepcopy(network)
    layers = [(theirs[i], "weight") for i in (0, 3, 5)]
    total = sum(layer.weight.numel() for layer, _ in layers)
    prune.global_unstructured(layers, prune.L1Unstructured, amount=round(0.6 * total))
    for (layer, _), zero in zip(layers, zeros.values(), strict=True):
        assert torch.equal(layer.weight_mask == 0, zero)


def test_random_choice_follows_the_seed_and_leaves_torchs_state_alone():
    network, random = toy(), pruner("random_unstructured")
    state = torch.get_rng_state()
    one, same, other = (zeros_of(network, random, seed)["5.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_zeros_survive_training_averaging_and_the_checkpoint(kind):
    network = toy()
    keep = KeepZeros(network, pruner(), 5, 0, "pruners.l1")
    zeros = keep.zeros
    assert sparsity_of(network) == pytest.approx(0.6, abs=1e-3)
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(network.parameters(), lr=0.1, weight_decay=0.1, **settings)
    average = torch.optim.swa_utils.AveragedModel(toy())
    start = {name: weight.clone() for name, weight in prunable_weights(network).items()}
    for step in train_steps(network, keep, range(5), optimizer):
        average.update_parameters(network)
        assert keep.met_after(step)
    keep.project(average.module)
    for name, weight in prunable_weights(network).items():
        assert not torch.equal(weight, start[name])
        assert torch.equal(weight == 0, zeros[name])
    other = toy()
    again = KeepZeros(other, pruner(sparsity=0.0), 5, 0, "pruners.l1")
    list(train_steps(other, again, range(1)))
    again.load_state_dict(keep.state_dict())
    list(train_steps(other, again, range(1, 2)))
    assert sparsity_of(other) == sparsity_of(network) == pytest.approx(0.6, abs=1e-3)
    assert sparsity_of(average.module) >= sparsity_of(network)


def test_a_network_laid_out_anew_keeps_its_zeros_and_projecting_makes_them_positive():
    network = toy()
    keep = KeepZeros(network, pruner(), 3, 0, "pruners.l1")
    zeros = keep.zeros
    network.to(memory_format=torch.channels_last)
    list(train_steps(network, keep, range(3)))
    weights = prunable_weights(network)
    assert all(torch.equal(weight == 0, zeros[name]) for name, weight in weights.items())
    # a product with 0 may be -0, which gzip does not see as the same as 0
    assert any((torch.signbit(weight) & (weight == 0)).any() for weight in weights.values())
    keep.project(network)
    assert not any((torch.signbit(weight) & (weight == 0)).any() for weight in prunable_weights(network).values())


def test_the_gradual_schedule_is_equation_1_of_zhu_and_gupta():
    found = sparsities(gradual(sparsity=0.8), 20, "pruners.l1")
    start, interval, count = 2, 2, 4  # t0, dt and n
    assert found == {
        t: pytest.approx(0.8 + (0 - 0.8) * (1 - (t - start) / (count * interval)) ** 3) for t in (4, 6, 8, 10)
    }
    assert found[10] == 0.8


def test_a_gradual_schedule_whose_interval_does_not_divide_the_steps_ends_before_its_end():
    assert list(sparsities(gradual(pruning_periods=3), 20, "pruners.l1")) == [4, 6, 8]
    whole = gradual(start_fraction=0.0, end_fraction=1.0, pruning_periods=2)
    assert list(sparsities(whole, 20, "pruners.l1")) == [10, 20]
    with pytest.raises(UserError, match=r"^pruners\.l1\.pruning_periods = 9: only 8 of 20 steps .* in an epoch: 4\)"):
        sparsities(gradual(pruning_periods=9).model_copy(update={"epochs": 5}), 20, "pruners.l1")


@methods
@scopes
def test_gradual_pruning_follows_its_schedule_and_no_weight_comes_back(method, scope):
    network = toy()
    sizes = {name: weight.numel() for name, weight in prunable_weights(network).items()}
    keep = KeepZeros(network, gradual(method=method, scope=scope), 20, 7, "pruners.l1")
    assert sparsity_of(network) == 0
    earlier = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in prunable_weights(network).items()}
    wanted = 0.0
    for step in train_steps(network, keep, range(20)):
        wanted = {4: 0.6 * (1 - 0.75**3), 6: 0.6 * (1 - 0.5**3), 8: 0.6 * (1 - 0.25**3), 10: 0.6}.get(step + 1, wanted)
        zeros = {name: weight == 0 for name, weight in prunable_weights(network).items()}
        counts = {name: int(zero.sum()) for name, zero in zeros.items()}
        if scope == "layer":
            assert counts == {name: round(wanted * size) for name, size in sizes.items()}
        else:
            assert sum(counts.values()) == round(wanted * sum(sizes.values()))
        assert all((zeros[name] | ~earlier[name]).all() for name in zeros)
        assert keep.met_after(step) == (step >= 9)
        earlier = zeros


def test_gradual_pruning_chooses_by_the_weights_of_the_moment():
    network = toy()
    keep = KeepZeros(network, gradual(pruning_periods=1, start_fraction=0.0, end_fraction=0.1), 20, 0, "pruners.l1")
    at_the_start = zeros_of(network, pruner(), 0)
    list(train_steps(network, keep, range(1)))
    before = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    with torch.no_grad():
        network[5].weight.mul_(0.5)
        before[5].weight.mul_(0.5)
    list(train_steps(network, keep, range(1, 2), optimizer))
    assert all(torch.equal(zeros_of(before, pruner(), 0)[name], zeros) for name, zeros in keep.zeros.items())
    assert not torch.equal(at_the_start["5.weight"], keep.zeros["5.weight"])


@methods
def test_gradual_pruning_resumed_from_its_state_goes_on_as_if_never_stopped(method):
    def optimizer_of(network):
        return torch.optim.SGD(network.parameters(), lr=0.05, weight_decay=0.1)

    whole = toy()
    keep = KeepZeros(whole, gradual(method=method), 20, 7, "pruners.l1")
    list(train_steps(whole, keep, range(7), optimizer_of(whole)))
    resumed = copy.deepcopy(whole)
    again = KeepZeros(resumed, gradual(method=method), 20, 7, "pruners.l1")
    again.load_state_dict(copy.deepcopy(keep.state_dict()))
    list(train_steps(whole, keep, range(7, 20), optimizer_of(whole)))
    list(train_steps(resumed, again, range(7, 20), optimizer_of(resumed)))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_gradual_target_that_empties_a_layer_is_refused_before_training_where_that_is_certain():
    network = toy()
    for settings in ({"scope": "layer"}, {"method": "random_unstructured", "scope": "global"}):
        with pytest.raises(UserError, match=r"^pruners\.l1\.sparsity = 0\.9999: leaves no weight in"):
            KeepZeros(network, gradual(sparsity=0.9999, **settings), 20, 0, "pruners.l1")
    with torch.no_grad():
        network[5].weight.mul_(1e-3)
    keep = KeepZeros(network, gradual(sparsity=0.8), 20, 0, "pruners.l1")  # training may yet enlarge them: it does not
    with pytest.raises(UserError, match=EMPTIES_5):
        list(train_steps(network, keep, range(20), torch.optim.SGD(network.parameters(), lr=1e-6)))


def two_of_four_toy() -> nn.Sequential:
    """Inputs: 3 (left dense), 8, 1 of a depthwise convolution (left dense), 4 of a grouped one, 6 (left dense), 12."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 1, groups=2),
        nn.Conv2d(6, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


@methods
def test_two_of_every_four_neighboring_inputs_of_each_output_are_zero(method):
    network = two_of_four_toy()
    weights = {name: weight.clone() for name, weight in prunable_weights(network).items()}
    zeros = KeepZeros(network, pruner(method, 0.5, "layer", pattern="2:4"), 1, 3, "pruners.l1").zeros
    assert list(zeros) == ["1.weight", "3.weight", "7.weight"]
    assert left_dense(network) == ["0", "2", "4"]
    for name, zero in zeros.items():
        weight = weights[name][..., None, None] if weights[name].dim() == 2 else weights[name]
        zero = zero.view(weight.shape)
        for output, first, row, column in torch.cartesian_prod(
            *[torch.arange(n) for n in (weight.shape[0], weight.shape[1] // 4, *weight.shape[2:])]
        ).tolist():
            four = slice(4 * first, 4 * first + 4)
            magnitudes, chosen = weight[output, four, row, column].abs(), zero[output, four, row, column]
            assert int(chosen.sum()) == 2
            if method == "l1_unstructured":
                assert magnitudes[chosen].max() < magnitudes[~chosen].min()
    found = prunable_weights(network)
    assert sum(int((w == 0).sum()) for w in found.values()) == sum(weights[n].numel() // 2 for n in zeros)
    assert all(torch.equal(found[f"{name}.weight"], weights[f"{name}.weight"]) for name in left_dense(network))


def test_networks_with_nothing_to_prune_are_refused_and_a_sparsity_of_zero_chooses_nothing():
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(UserError, match=r"^pruners\.l1\.pattern = '2:4': fits no layer"):
        zeros_of(network, pruner(sparsity=0.5, scope="layer", pattern="2:4"), seed=0)
    with pytest.raises(UserError, match="no convolution or Linear layer"):
        zeros_of(nn.Sequential(nn.Flatten(), nn.LayerNorm(4)), pruner(), seed=0)
    assert not any(zero.any() for zero in zeros_of(toy(), pruner(sparsity=0.0), seed=0).values())


def test_a_sparsity_that_empties_a_layer_is_refused_with_its_name():
    network = toy()
    with torch.no_grad():
        network[5].weight.mul_(1e-3)  # a head of small weights, as a fine-tuned one has
    with pytest.raises(UserError, match=EMPTIES_5):
        zeros_of(network, pruner(sparsity=0.8), seed=0)
    assert not zeros_of(network, pruner(sparsity=0.8, scope="layer"), seed=0)["5.weight"].all()

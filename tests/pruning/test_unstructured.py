import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from stages.common.errors import UserError
from stages.common.params import Unstructured
from stages.pruning.unstructured import KeepZeros, prunable_weights, sparsity_of, zeros_of


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 5)
    )


def pruner(method="l1_unstructured", sparsity=0.6, scope="global") -> Unstructured:
    return Unstructured(method=method, sparsity=sparsity, scope=scope, epochs=1, learning_rate_factor=1.0)


@pytest.mark.parametrize("method", ["l1_unstructured", "random_unstructured"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_exactly_the_asked_share_of_weights_is_chosen(method, scope):
    network = toy()
    zeros = zeros_of(network, pruner(method, 0.37, scope), seed=3)
    assert list(zeros) == ["0.weight", "3.weight", "5.weight"]
    if scope == "layer":
        assert all(int(z.sum()) == round(0.37 * z.numel()) for z in zeros.values())
    else:
        assert sum(int(z.sum()) for z in zeros.values()) == round(0.37 * sum(z.numel() for z in zeros.values()))


def test_global_choice_is_that_of_torchs_own_pruning():
    network = toy()
    zeros = zeros_of(network, pruner(), seed=0)
    theirs = copy.deepcopy(network)
    layers = [(theirs[i], "weight") for i in (0, 3, 5)]
    total = sum(layer.weight.numel() for layer, _ in layers)
    prune.global_unstructured(layers, prune.L1Unstructured, amount=round(0.6 * total))
    for (layer, _), zero in zip(layers, zeros.values(), strict=True):
        assert torch.equal(layer.weight_mask == 0, zero)


def test_l1_takes_the_smallest_weights():
    network = toy()
    zeros = zeros_of(network, pruner(), seed=0)
    weights = prunable_weights(network)
    largest_zeroed = max(float(weights[name][zero].abs().max()) for name, zero in zeros.items() if zero.any())
    smallest_kept = min(float(weights[name][~zero].abs().min()) for name, zero in zeros.items())
    assert largest_zeroed <= smallest_kept


def test_random_choice_follows_the_seed_and_leaves_torchs_state_alone():
    network, random = toy(), pruner("random_unstructured")
    state = torch.get_rng_state()
    one, same, other = (zeros_of(network, random, seed)["5.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_choosing_leaves_the_network_without_masks_or_hooks():
    network = toy()
    before = copy.deepcopy(network.state_dict())
    zeros_of(network, pruner(), seed=0)
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_zeros_survive_training_averaging_and_saving(kind):
    network = toy()
    zeros = zeros_of(network, pruner(), seed=0)
    keep = KeepZeros(network, zeros)
    keep.project(network)
    assert sparsity_of(network) == pytest.approx(0.6, abs=1e-3)
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(network.parameters(), lr=0.1, weight_decay=0.1, **settings)
    average = torch.optim.swa_utils.AveragedModel(toy())
    start = {name: weight.clone() for name, weight in prunable_weights(network).items()}
    for step in range(5):
        network.zero_grad()
        network(torch.randn(4, 3, 6, 6)).square().mean().backward()
        keep.before_step(step)
        optimizer.step()
        keep.after_step(step)
        average.update_parameters(network)
        assert keep.met_after(step)
    keep.project(average.module)
    for name, weight in prunable_weights(network).items():
        assert not torch.equal(weight, start[name])
        assert torch.equal(weight == 0, zeros[name])
    again = KeepZeros(network, {})
    again.load_state_dict(keep.state_dict())
    other = toy()
    again.project(other)
    assert sparsity_of(other) == sparsity_of(network) == pytest.approx(0.6, abs=1e-3)
    assert sparsity_of(average.module) >= sparsity_of(network)


def test_zero_sparsity_chooses_nothing():
    assert not any(zero.any() for zero in zeros_of(toy(), pruner(sparsity=0.0), seed=0).values())


def test_network_without_weights_to_prune_is_refused():
    with pytest.raises(UserError, match="no convolution or Linear layer"):
        zeros_of(nn.Sequential(nn.Flatten(), nn.LayerNorm(4)), pruner(), seed=0)


def test_a_sparsity_that_empties_a_layer_is_refused_with_its_name():
    network = toy()
    with torch.no_grad():
        network[5].weight.mul_(1e-3)  # a head of small weights, as a fine-tuned one has
    with pytest.raises(UserError, match=r"leaves no weight in 5: lower sparsity, or set scope: layer"):
        zeros_of(network, pruner(sparsity=0.8), seed=0)
    assert not zeros_of(network, pruner(sparsity=0.8, scope="layer"), seed=0)["5.weight"].all()

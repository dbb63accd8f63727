"""What is ours around Torch-Pruning: the search for the ratio, the widths that layers keep, and what is refused."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from cuttable import SMALL, TOY, builder, folded
from torch import nn

from stages.common.errors import UserError
from stages.networks.build import build_network
from stages.networks.spec import NetworkSpec
from stages.params.pruners import Depgraph
from stages.pruning.costs import costs_of
from stages.pruning.depgraph import SEARCH_STEPS, GroupLasso, TorchPruning
from stages.pruning.steering import PruningSchedule

KEY = "pruners.toy"


def depgraph(**settings) -> Depgraph:
    return Depgraph(method="depgraph", epochs=2, learning_rate_factor=1.0, **settings)


def library(spec: NetworkSpec, size: int = 32, **settings) -> TorchPruning:
    return TorchPruning(spec, depgraph(**settings), size, KEY)


def pruned(network: nn.Module, spec: NetworkSpec, **settings) -> tuple[nn.Module, dict[str, float]]:
    peer = library(spec, **settings)
    subnet, _, channels = peer.prune(network, peer.find_ratio(network))
    return subnet, channels


def widths(network: nn.Module) -> list[int]:
    return [len(module.weight) for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)][:-1]


def grouped() -> nn.Module:
    layers = [nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 48, 3, groups=3), nn.ReLU(), nn.Conv2d(48, 40, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 4))


@pytest.fixture
def convnext():
    return folded("timm", "convnext_atto", SMALL)


def test_group_sparsity_is_the_fraction_that_goes_in_every_layer(convnext):
    network, spec = convnext
    subnet, channels = pruned(network, spec, group_sparsity=0.25)
    assert widths(subnet) == [3 * width // 4 for width in widths(network)]
    assert channels["group_sparsity"] == 0.25
    assert channels["channels"] == 0.75 * channels["channels_dense"]


def test_a_network_for_gray_images_is_cut():
    network, spec = folded("timm", "convnext_atto", SMALL, channels=1)
    subnet, channels = pruned(network, spec, group_sparsity=0.25)
    assert subnet(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
    assert channels["group_sparsity"] == 0.25


@pytest.mark.parametrize(
    "settings", [{"minimum_width": 7}, {"divisible_by": 8}, {"minimum_width": 7, "divisible_by": 4}]
)
def test_layers_keep_the_width_that_is_asked_for(convnext, settings):
    network, spec = convnext
    subnet, _ = pruned(network, spec, macs_reduction=0.4, **settings)
    multiple, least = settings.get("divisible_by", 1), settings.get("minimum_width", 1)
    assert widths(subnet) != widths(network)
    for left, before in zip(widths(subnet), widths(network), strict=True):
        assert left == before or (left >= least and left % multiple == 0)


@pytest.mark.parametrize("settings", [{"minimum_width": 7}, {"divisible_by": 8, "minimum_width": 20}])
def test_grouped_convolutions_keep_the_width_that_is_asked_for(monkeypatch, settings):
    monkeypatch.setattr("stages.pruning.depgraph.build_network", builder(grouped))
    network = grouped().eval()
    for target in (0.3, 0.45):
        subnet, _ = pruned(network, TOY, macs_reduction=target, **settings)
        for left, before in zip(widths(subnet), widths(network), strict=True):
            assert left == before or (left >= settings["minimum_width"] and left % settings.get("divisible_by", 1) == 0)


def test_the_ratio_is_the_least_that_meets_the_target(convnext):
    network, spec = convnext
    dense, peer = costs_of(network, [], 32).macs_dense, library(spec, macs_reduction=0.5)
    ratio = peer.find_ratio(network)

    def left(ratio: float) -> float:
        return costs_of(peer.prune(network, ratio)[0], [], 32).macs_dense / dense

    assert left(ratio) <= 0.5 < left(ratio - 2**-SEARCH_STEPS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"group_sparsity": 0.5, "divisible_by": 8},
            r"group_sparsity = 0\.5: at most 0\.0 can go: .*mlp\.fc2 keeps 8 of its 8 channels, .*"
            " a multiple of 8 where it is cut$",
        ),
        ({"group_sparsity": 0.9}, r"group_sparsity = 0\.9: at most 0\.875 can go: .*\.fc2 keeps 1 of its 8 channels, "),
        ({"macs_reduction": 0.9, "minimum_width": 10}, r"macs_reduction = 0\.9: at most 0\.442 can go.* at least 10$"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused_with_the_nearest_that_can_and_the_cause(convnext, settings, message):
    network, spec = convnext
    with pytest.raises(UserError, match=rf"^pruners\.toy\.{message}"):
        library(spec, **settings).find_ratio(network)


def test_the_nearest_target_that_is_named_can_be_met(convnext):
    network, spec = convnext
    assert 0 < library(spec, macs_reduction=0.442, minimum_width=10).find_ratio(network) <= 1
    assert library(spec, group_sparsity=0.875).find_ratio(network) == 0.875


def test_a_network_that_the_library_cannot_prune_is_refused_without_a_warning():
    spec = NetworkSpec("timm", "vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}, 4)
    refusal = r"^pruners\.toy \(method depgraph\): timm vit_tiny_patch16_224: Torch-Pruning cannot prune this network"
    with warnings.catch_warnings(), pytest.raises(UserError, match=rf"{refusal} \(it leaves cls_token with shape"):
        warnings.simplefilter("error")
        library(spec, group_sparsity=0.5).find_ratio(build_network(spec))


def test_a_graph_that_the_library_cannot_follow_is_refused():
    spec = NetworkSpec("torchvision", "shufflenet_v2_x0_5", {}, 4)
    with pytest.raises(UserError, match=r"cannot prune this network \(it cannot follow the network's operations"):
        library(spec, 64, group_sparsity=0.5).find_ratio(build_network(spec))


def test_the_group_lasso_acts_on_the_steps_of_its_schedule(convnext):
    network, _ = convnext
    pruner = depgraph(group_sparsity=0.5, importance="group_lasso", penalty=0.1)
    lasso = GroupLasso(network, pruner, 32, PruningSchedule(2, 3, 1))
    for step in range(7):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        lasso.before_step(step)
        acted = any(parameter.grad.any() for parameter in network.parameters())
        assert acted == (2 <= step < 5)
        assert lasso.met_after(step) == (step >= 4)


def test_a_network_on_which_the_group_lasso_fails_is_refused_before_any_training():
    spec = NetworkSpec("timm", "regnetx_002", {}, 4)
    network = build_network(spec)
    assert library(spec, macs_reduction=0.3).find_ratio(network) > 0
    with pytest.raises(UserError, match=r"^pruners\.toy \(method depgraph\): timm regnetx_002: .*set importance: magn"):
        library(spec, macs_reduction=0.3, importance="group_lasso").find_ratio(network)
    with pytest.raises(UserError, match=r"a multiple of 16 where it is cut, a multiple of \d+ here for its groups$"):
        library(spec, group_sparsity=0.9, divisible_by=16).find_ratio(network)


def test_widths_do_not_depend_on_the_weights_so_a_ratio_holds_after_training(convnext):
    network, spec = convnext
    peer, other = library(spec, params_reduction=0.5), copy.deepcopy(network)
    ratio = peer.find_ratio(network)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    one, _, _ = peer.prune(network, ratio)
    same, found, _ = peer.prune(other, ratio)
    assert widths(one) == widths(same)
    assert found == replace(spec, widths=found.widths, layer_norm_widths=found.layer_norm_widths, layer_norm="plain")

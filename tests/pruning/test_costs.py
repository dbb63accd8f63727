from dataclasses import replace

import pytest
import torch
from toy_groups import GROUPS, toy

from stages.networks.build import build_network
from stages.networks.modules import output_positions
from stages.networks.reparameterize import fold_layer_scale
from stages.networks.spec import NetworkSpec
from stages.profiling.counts import count_layers, totals
from stages.pruning.costs import costs_of
from stages.pruning.groups import cut_channels
from stages.pruning.only_train_once_adapter import channel_groups

SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 24)}
NETWORKS = {
    "convnext, linear": ("timm", "convnext_atto", SMALL | {"conv_mlp": False}),
    "convnext, 1x1 convolutions": ("timm", "convnext_atto", SMALL | {"conv_mlp": True}),
    "resnet": ("timm", "resnet18", {}),
    "squeeze and excitation": ("timm", "mobilenetv3_small_050", {}),
}


def built(name):
    torch.manual_seed(0)
    spec = NetworkSpec(*NETWORKS[name], classes=5)
    network = build_network(spec).eval()
    fold_layer_scale(network)
    return network, replace(spec, layer_scale_folded=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_those_of_the_network_that_is_cut(name):
    network, spec = built(name)
    groups = channel_groups(network, 32)
    costs = costs_of(network, groups, 32)
    dense = totals(count_layers(network, 32, {}))
    assert (costs.params_dense, costs.macs_dense) == (dense["params"], dense["macs"])
    whole = torch.tensor([group.channels for group in groups])
    assert (costs.params(whole).item(), costs.macs(whole).item()) == (dense["params"], dense["macs"])
    pruned = {g.name: torch.rand(g.channels).argsort() < int(torch.randint(g.channels, ())) for g in groups}
    subnet, _ = cut_channels(network, spec, groups, pruned)
    kept = torch.tensor([int((~gone).sum()) for gone in pruned.values()])
    left = totals(count_layers(subnet, 32, {}))
    assert costs.params(kept).item() == left["params"] == sum(p.numel() for p in subnet.parameters())
    assert costs.macs(kept).item() == left["macs"]
    assert left["macs"] < dense["macs"]


def test_many_candidates_are_counted_at_once():
    network = toy()
    costs = costs_of(network, GROUPS, 4)
    kept = torch.tensor([[10, 6, 12], [10, 6, 5], [3, 2, 1]])
    params = [
        10 * 27 + 10 + 20 + 6 * 90 + 6 + 192 + 12 * 96 + 12 + 36 + 3,
        10 * 27 + 10 + 20 + 6 * 90 + 6 + 192 + 5 * 96 + 5 + 15 + 3,
        3 * 27 + 3 + 6 + 2 * 27 + 2 + 64 + 1 * 32 + 1 + 3 + 3,
    ]
    macs = [
        16 * (10 * 27 + 6 * 90) + 12 * 96 + 36,
        16 * (10 * 27 + 6 * 90) + 5 * 96 + 15,
        16 * (3 * 27 + 2 * 27) + 32 + 3,
    ]
    assert costs.params(kept).tolist() == params
    assert costs.macs(kept).tolist() == macs


def test_measuring_leaves_the_network_as_it_is():
    network = toy().train()
    network[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert output_positions(network, 4) == {"0.weight": 16, "3.weight": 16, "6.weight": 1, "8.weight": 1}
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [module.training for module in network] == [True, False] + [True] * 7
    assert not any(module._forward_hooks for module in network.modules())

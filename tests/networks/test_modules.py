import pytest
import torch
from torch import nn

from stages.networks.build import build_network
from stages.networks.modules import load_tensors, output_positions, replace_module
from stages.networks.spec import NetworkSpec

MNASNET = NetworkSpec("torchvision", "mnasnet0_5", {}, 4)  # refuses tensors that come without its version


def test_tensors_from_a_plain_mapping_make_the_same_network():
    network, other = build_network(MNASNET).eval(), build_network(MNASNET).eval()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(network(x), other(x))
    load_tensors(other, dict(network.state_dict()))
    assert torch.equal(network(x), other(x))


def test_a_missing_tensor_is_refused_unless_that_is_allowed():
    network = nn.Linear(2, 3)
    before = network.weight.clone()
    with pytest.raises(RuntimeError, match="Missing key"):
        load_tensors(network, {"bias": torch.ones(3)})
    load_tensors(network, {"bias": torch.ones(3)}, strict=False)
    assert torch.equal(network.weight, before)
    assert torch.equal(network.bias, torch.ones(3))


@pytest.mark.parametrize("training", [True, False])
def test_a_replacement_takes_over_the_training_mode(training):
    network = nn.Sequential(nn.ReLU(), nn.ReLU()).train(training)
    replace_module(network, "1", nn.Dropout().train(not training))
    assert network[1].training == training


def test_output_positions_count_reused_layers_twice_and_leave_the_training_mode():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(shared, shared, nn.Flatten(), nn.Linear(3 * 16, 2))
    network[3].eval()
    assert output_positions(network, 4) == {"0.weight": 2 * 16, "3.weight": 1}
    assert [module.training for module in network] == [True, True, True, False]
    assert not shared._forward_hooks

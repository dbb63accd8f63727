import pytest
import torch
from torch import nn

from stages.networks.build import NetworkSpec, build_network
from stages.networks.tensors import load_tensors

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

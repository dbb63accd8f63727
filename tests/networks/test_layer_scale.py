import copy

import pytest
import timm
import torch
import torchvision
from torchvision.models.convnext import CNBlockConfig

from stages.networks.layer_scale import fold_layer_scale


def timm_network(conv_mlp: bool):
    return timm.create_model(
        "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=3, conv_mlp=conv_mlp, ls_init_value=0.1
    )


def torchvision_network():
    blocks = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 2)]
    return torchvision.models.ConvNeXt(blocks, num_classes=3, layer_scale=0.1)


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    network = torchvision_network() if name == "torchvision" else timm_network(name == "timm convolution")
    for key, parameter in network.named_parameters():
        if parameter.dim() == 1 or "layer_scale" in key:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return network.eval()


@pytest.mark.parametrize("name", ["timm convolution", "timm linear", "torchvision"])
def test_folding_keeps_the_output_and_removes_the_scale(name):
    network = make(name)
    folded = copy.deepcopy(network)
    fold_layer_scale(folded)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded(x), network(x), atol=1e-5, rtol=1e-4)
    scales = [key for key in network.state_dict() if "gamma" in key or "layer_scale" in key]
    assert scales
    assert set(folded.state_dict()) == set(network.state_dict()) - set(scales)


@pytest.mark.parametrize("name", ["timm convolution", "torchvision"])
def test_folding_twice_changes_nothing_more(name):
    network = make(name)
    fold_layer_scale(network)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    fold_layer_scale(network)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


def test_network_without_layer_scale_is_left_as_it_is():
    network = timm.create_model("resnet18", num_classes=2)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    fold_layer_scale(network)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())

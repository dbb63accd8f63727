import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from stages.networks.reparameterize import PointwiseLinear, fold_layer_scale, is_pointwise, pointwise_to_linear


def convnext(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "torchvision":
        blocks = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 2)]
        network = torchvision.models.ConvNeXt(blocks, num_classes=3, layer_scale=0.1)
    else:
        sizes = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}
        conv_mlp = name == "timm, convolutional MLP"
        network = timm.create_model("convnext_atto", **sizes, num_classes=3, conv_mlp=conv_mlp, ls_init_value=0.1)
    for key, parameter in network.named_parameters():
        if parameter.dim() == 1 or "layer_scale" in key:
            nn.init.normal_(parameter, 0.5, 0.3)
    return network.eval()


@pytest.mark.parametrize("name", ["timm, convolutional MLP", "timm", "torchvision"])
def test_folding_keeps_the_output_and_removes_the_scale_and_a_second_time_changes_nothing(name):
    network = convnext(name)
    folded = copy.deepcopy(network)
    fold_layer_scale(folded)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded(x), network(x), atol=1e-5, rtol=1e-4)
    scales = {key for key in network.state_dict() if "gamma" in key or "layer_scale" in key}
    assert scales
    assert set(folded.state_dict()) == set(network.state_dict()) - scales
    before = copy.deepcopy(folded.state_dict())
    fold_layer_scale(folded)
    assert all(torch.equal(before[key], tensor) for key, tensor in folded.state_dict().items())


@torch.no_grad()
def test_only_plain_pointwise_convolutions_become_linear_and_the_output_stays():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 12, 1, bias=False),
        nn.Conv2d(12, 12, 1, groups=12),
        nn.Conv2d(12, 12, 1, stride=2),
        nn.Conv2d(12, 4, 1, padding=1),
    ).eval()
    linear = copy.deepcopy(network)
    pointwise_to_linear(linear)
    plain = [False, True, True, False, False, False]
    assert [is_pointwise(module) for module in network] == plain
    assert [isinstance(module, PointwiseLinear) for module in linear] == plain
    assert linear[2].linear.bias is None
    assert sum(p.numel() for p in linear.parameters()) == sum(p.numel() for p in network.parameters())
    x = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(linear(x), network(x))

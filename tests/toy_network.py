"""A ConvNeXt of 26 thousand parameters whose random weights give logits that differ."""

import torch
from torch import nn

from stages.networks.build import build_network
from stages.networks.spec import NetworkSpec


def tiny_spec(classes: int = 10, conv_mlp: bool = True) -> NetworkSpec:
    """The MLP is 1x1 convolutions, or Linear."""
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "conv_mlp": conv_mlp, "ls_init_value": 0.5}
    return NetworkSpec("timm", "convnext_atto", arguments, classes)


def tiny_network(spec: NetworkSpec, bias_std: float = 0.0) -> nn.Module:
    """The network of the spec in evaluation mode, the same at each call; biases are random if `bias_std` is not 0."""
    torch.manual_seed(0)
    network = build_network(spec).eval()
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if bias_std:
                nn.init.normal_(module.bias, std=bias_std)
    return network


# A user's file whose bilinear layer multiplies in an operator of unknown cost
UNCOUNTABLE = """\
import torch
from torch import nn


class Pairs(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.pairs = nn.Conv2d(3, 4, 3), nn.Bilinear(4, 4, classes)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.pairs(x, x)


def build(classes, channels):
    return Pairs(classes)
"""

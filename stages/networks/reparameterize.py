"""Write layers in another form without changing a network's output: layer scale folded, 1x1 convolutions as Linear."""

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torchvision.models.convnext import CNBlock

from stages.networks.modules import along_outputs, replace_module


@torch.no_grad()
def fold_layer_scale(network: nn.Module) -> None:
    """Multiply the layer scale of each ConvNeXt block into its last layer and remove the scale, in place.

    gamma * (W x + b) = (gamma W) x + gamma b. Networks without layer scale are not changed.
    """
    for module in network.modules():
        if isinstance(module, ConvNeXtBlock) and module.gamma is not None:
            _scale(module.mlp.fc2, module.gamma)
            module.gamma = None
        elif isinstance(module, CNBlock) and isinstance(module.layer_scale, nn.Parameter):
            _scale(next(m for m in reversed(module.block) if isinstance(m, nn.Linear)), module.layer_scale.flatten())
            del module.layer_scale
            module.layer_scale = 1


def _scale(layer: nn.Linear | nn.Conv2d, gamma: torch.Tensor) -> None:
    layer.weight.mul_(along_outputs(gamma, layer.weight))
    if layer.bias is not None:
        layer.bias.mul_(gamma)


class PointwiseLinear(nn.Module):
    """A 1x1 convolution computed as a Linear layer over the channels: `[N, C, H, W]` in and out."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def is_pointwise(module: nn.Module) -> bool:
    """True for a 1x1 convolution with stride 1, one group and no padding."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), 0, "valid", "same")
        and module.groups == 1
    )


@torch.no_grad()
def pointwise_to_linear(network: nn.Module) -> None:
    """Replace every pointwise convolution by a `PointwiseLinear`, in place, so that quantizers of Linear reach it."""
    for name, module in list(network.named_modules()):
        if is_pointwise(module):
            linear = nn.Linear(module.in_channels, module.out_channels, bias=module.bias is not None)
            linear.weight.copy_(module.weight.flatten(1))
            if module.bias is not None:
                linear.bias.copy_(module.bias)
            replace_module(network, name, PointwiseLinear(linear))

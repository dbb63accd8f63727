"""Fold ConvNeXt's layer scale into the last pointwise layer of its block: exact, and one parameter fewer to follow."""

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torchvision.models.convnext import CNBlock

from stages.networks.tensors import along_outputs


@torch.no_grad()
def fold_layer_scale(network: nn.Module) -> None:
    """Multiply each block's scale into the weight and bias of its last layer and remove it, in place.

    `gamma * (W x + b) = (gamma W) x + gamma b`; networks without layer scale are left as they are.
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

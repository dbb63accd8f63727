"""Layers whose weights are stored as integers, of either kind: PyTorch's own dynamic int8, and ours of 2 to 8 bits."""

import torch
from torch import nn

from stages.networks.dynamic_int8 import dynamic_layers, unpack_layer, without_dynamic
from stages.networks.integer_weights import integer_layers, without_integers


def packed_layers(network: nn.Module) -> dict[str, nn.Module]:
    """By name."""
    return dynamic_layers(network) | integer_layers(network)


def tensors_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """What a packed layer holds: `weight` int8, `weight_scale` float32 `[out]` or `[1]`, maybe `bias` and more."""
    return layer.tensors() if hasattr(layer, "tensors") else unpack_layer(layer)


def dequantized(network: nn.Module) -> nn.Module:
    """A float copy: each packed layer becomes the plain layer with the values that its integers stand for."""
    return without_integers(without_dynamic(network))

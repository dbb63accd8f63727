"""The layers of a network that get integer weights, and what a search may know of them."""

from dataclasses import dataclass

import torch
from torch import nn

from stages.common.errors import UserError
from stages.networks.integer_weights import KINDS
from stages.networks.pointwise import is_pointwise
from stages.networks.positions import output_positions

LAYER_KINDS = ("linear", "pointwise", "depthwise", "convolution")
HAS_WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.MultiheadAttention, nn.Embedding)
"""Kinds of modules that multiply weights; those without an integer form are named and stay in float."""


@dataclass(frozen=True)
class Layer:
    """One layer, in the order in which the network runs them."""

    name: str
    kind: str
    """One of `LAYER_KINDS`."""
    weights: int
    macs: int
    """For one image."""
    inputs: int
    """Channels."""
    outputs: int
    """Channels."""
    window: int
    """Places of a kernel: 1 for linear layers."""


def integer_candidates(network: nn.Module, input_size: int) -> tuple[list[Layer], list[str]]:
    """The layers that can have integer weights, in the order of execution, and the names of those that stay in float.

    The latter have no integer form, or the network never runs them.

    Raises:
        UserError: if there is none, or a weight is NaN or infinite.
    """
    modules = dict(network.named_modules())
    positions = {name.removesuffix(".weight"): times for name, times in output_positions(network, input_size).items()}
    found = [_describe(name, modules[name], times) for name, times in positions.items() if type(modules[name]) in KINDS]
    if not found:
        raise UserError(f"{type(network).__name__} has no Linear or Conv2d layer whose weights could be integers")
    for layer in found:
        if not torch.isfinite(modules[layer.name].weight).all():
            raise UserError(f"{layer.name}.weight holds NaN or infinite values: it cannot be rounded")
    unused = [name for name, module in modules.items() if type(module) in KINDS and name not in positions]
    return found, without_integer_form(network) + unused


def without_integer_form(network: nn.Module) -> list[str]:
    """Names of the layers whose weights stay in float, being of a kind that has no integer form."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, HAS_WEIGHTS) and type(module) not in KINDS and list(module.parameters(recurse=False))
    ]


def _describe(name: str, module: nn.Module, positions: int) -> Layer:
    macs = positions * module.weight.numel()
    if isinstance(module, nn.Linear):
        return Layer(name, "linear", module.weight.numel(), macs, module.in_features, module.out_features, 1)
    depthwise = module.groups > 1 and module.groups == module.in_channels
    kind = "pointwise" if is_pointwise(module) else "depthwise" if depthwise else "convolution"
    window = module.kernel_size[0] * module.kernel_size[1]
    return Layer(name, kind, module.weight.numel(), macs, module.in_channels, module.out_channels, window)

"""The layers of a network that can have integer weights, and the features of each that a search uses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stages.common.errors import UserError
from stages.networks.integer_weights import KINDS
from stages.networks.modules import excluded_modules, output_positions
from stages.networks.reparameterize import is_pointwise

LAYER_KINDS = ("linear", "pointwise", "depthwise", "convolution")
HAS_WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.MultiheadAttention, nn.Embedding)
"""Kinds of modules that multiply weights; those without an integer form stay in float, and messages name them."""


@dataclass(frozen=True)
class Layer:
    """One layer, in the order in which the network runs them."""

    name: str
    kind: str
    """One of `LAYER_KINDS`."""
    weights: int
    macs: int
    """Multiply-accumulates for one image."""
    inputs: int
    """Input channels."""
    outputs: int
    """Output channels."""
    window: int
    """Positions of the kernel: 1 for linear layers."""


def integer_candidates(
    network: nn.Module, input_size: int, exclude: Sequence[str] = ()
) -> tuple[list[Layer], list[str]]:
    """The layers that get integer weights, in the order of execution, and the names of those that stay in float.

    The latter have no integer form, never run, or lie in a module that `exclude` names.

    Raises:
        UserError: If there is none, a weight is NaN or infinite, or two layers share a weight.
    """
    refuse_shared_weights(network)
    modules = dict(network.named_modules())
    positions = {name.removesuffix(".weight"): times for name, times in output_positions(network, input_size).items()}
    found = [_describe(name, modules[name], times) for name, times in positions.items() if type(modules[name]) in KINDS]
    if not found:
        raise UserError(f"{type(network).__name__} has no Linear or Conv2d layer whose weights could be integers")
    excluded = excluded_modules(network, exclude)
    found = [layer for layer in found if layer.name not in excluded]
    for layer in found:
        if not torch.isfinite(modules[layer.name].weight).all():
            raise UserError(f"{layer.name}.weight holds NaN or infinite values: it cannot be rounded")
    taken = {layer.name for layer in found}
    floats = [name for name, module in modules.items() if type(module) in KINDS and name not in taken]
    return found, without_integer_form(network) + floats


def refuse_shared_weights(network: nn.Module) -> None:
    """Raise a `UserError` if a layer that would get integers shares a parameter, or is itself in two places.

    Only one of the places would get them, and the result would be another network with more parameters.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    names: dict[nn.Parameter, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        first = names.setdefault(parameter, name)
        if first != name and any(type(modules[one.rpartition(".")[0]]) in KINDS for one in (first, name)):
            raise UserError(
                f"{first} and {name} are one and the same parameter: a layer's integers need a weight of their own;"
                " give each layer its own in the network's code, or take the fp32 quantizer"
            )


def without_integer_form(network: nn.Module) -> list[str]:
    """Names of the layers of a kind that has no integer form."""
    return [name for name in layers_with_weights(network) if type(network.get_submodule(name)) not in KINDS]


def layers_with_weights(network: nn.Module) -> list[str]:
    """Names of the layers that multiply their own float weights."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, HAS_WEIGHTS) and list(module.parameters(recurse=False))
    ]


def _describe(name: str, module: nn.Module, positions: int) -> Layer:
    macs = positions * module.weight.numel()
    if isinstance(module, nn.Linear):
        return Layer(name, "linear", module.weight.numel(), macs, module.in_features, module.out_features, 1)
    depthwise = module.groups > 1 and module.groups == module.in_channels
    kind = "pointwise" if is_pointwise(module) else "depthwise" if depthwise else "convolution"
    window = module.kernel_size[0] * module.kernel_size[1]
    return Layer(name, kind, module.weight.numel(), macs, module.in_channels, module.out_channels, window)

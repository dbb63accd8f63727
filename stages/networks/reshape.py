"""Bring a freshly built network to the widths that pruning left, and read those widths off a pruned one."""

import copy

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common.errors import UserError
from stages.networks.global_response_norm import counting_grn
from stages.networks.layer_norm import FixedDivisorLayerNorm, narrowed
from stages.networks.pointwise import replace_module

COUNTED = (nn.LayerNorm, FixedDivisorLayerNorm, GlobalResponseNorm)
"""Norms over channels: narrowed, they have to know their original width."""


def reshape(
    network: nn.Module, widths: dict[str, dict[str, int]], layer_norm_widths: dict[str, int], layer_norm: str = "exact"
) -> None:
    """Give the named modules their pruned sizes, with fresh weights, in place.

    Args:
        widths: for each narrowed module, the attributes that `widths_of` reads.
        layer_norm_widths: the original width of each narrowed LayerNorm or global response norm.
        layer_norm: how narrowed LayerNorms count, one of `layer_norm.FORMS`. Global response norms always count
            their original width: it costs nothing.

    Raises:
        UserError: if a name is not in the network or its module cannot be narrowed.
    """
    modules = dict(network.named_modules())
    for name, size in widths.items():
        module = modules.get(name)
        if isinstance(module, COUNTED) and module.weight is not None:
            original, told = len(module.weight), layer_norm_widths.get(name)
            if told != original:
                raise UserError(f"{name}: its original width is {original}, the file says {told}")
            is_grn = isinstance(module, GlobalResponseNorm)
            width = size["width"]
            new = counting_grn(module, width) if is_grn else narrowed(module, width, layer_norm)
        elif module is not None and size.keys() <= module._parameters.keys():
            _shorten(module, size)
            continue
        else:
            new = _resized(name, module, size)
        replace_module(network, name, new)


def _shorten(module: nn.Module, size: dict[str, int]) -> None:
    """Give a module's own vectors (a learned scale) their lengths, in place: it may hold other modules."""
    for attribute, length in size.items():
        old = getattr(module, attribute)
        setattr(module, attribute, nn.Parameter(torch.ones(length, *old.shape[1:])))


def _resized(name: str, module: nn.Module | None, size: dict[str, int]) -> nn.Module:
    """A copy of another size with fresh weights (a copy: a subclass may hold more, such as an activation)."""
    match module:
        case nn.Linear():
            shapes = {"weight": (size["out_features"], size["in_features"]), "bias": (size["out_features"],)}
        case nn.Conv2d():
            inside = size["in_channels"] // size["groups"]
            shapes = {"weight": (size["out_channels"], inside, *module.kernel_size), "bias": (size["out_channels"],)}
        case _BatchNorm():
            shapes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (size["num_features"],))
        case _:
            what = "no such module" if module is None else f"{type(module).__name__} cannot be narrowed"
            raise UserError(f"{name}: {what}")
    new = copy.deepcopy(module)
    for attribute, value in size.items():
        setattr(new, attribute, value)
    for tensor, shape in shapes.items():
        old = getattr(new, tensor)
        if old is not None:
            empty = torch.empty(shape)
            setattr(new, tensor, nn.Parameter(empty) if isinstance(old, nn.Parameter) else empty)
    new.reset_parameters()
    return new


def widths_of(pruned: nn.Module, dense: nn.Module) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Read the sizes of every module of `pruned` that differs from the one of the same name in `dense`.

    Returns:
        `widths` and `layer_norm_widths`, as `reshape` takes them.
    """
    originals = dict(dense.named_modules())
    widths, layer_norm_widths = {}, {}
    for name, module in pruned.named_modules():
        size = _size(module)
        if size is None or size == _size(originals[name]):
            continue
        widths[name] = size
        if isinstance(module, COUNTED):
            layer_norm_widths[name] = _size(originals[name])["width"]
    return widths, layer_norm_widths


def _size(module: nn.Module) -> dict[str, int] | None:
    """A module's sizes as its tensors have them (attributes may lag behind after a pruner cut the tensors)."""
    weight: torch.Tensor | None = getattr(module, "weight", None)
    match module:
        case nn.Linear():
            return {"in_features": weight.shape[1], "out_features": weight.shape[0]}
        case nn.Conv2d():
            groups = module.groups
            if groups > 1:  # whole groups go, each with its outputs: depthwise or not, their size stays
                groups = weight.shape[0] * groups // module.out_channels
            return {"in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0], "groups": groups}
        case _BatchNorm():
            return {"num_features": len(weight if weight is not None else module.running_mean)}
        case nn.LayerNorm() | FixedDivisorLayerNorm() | GlobalResponseNorm():
            return None if weight is None else {"width": len(weight)}
    own = {name: len(p) for name, p in module.named_parameters(recurse=False) if p.dim()}
    return own or None

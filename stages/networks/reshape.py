"""Give a freshly built network the widths that pruning left, and read those widths off a pruned network."""

import copy

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common.errors import UserError
from stages.networks.modules import replace_module
from stages.networks.norms import CHANNEL_NORMS, FixedDivisorLayerNorm, narrowed


def reshape(
    network: nn.Module, widths: dict[str, dict[str, int]], layer_norm_widths: dict[str, int], layer_norm: str = "exact"
) -> None:
    """Give the named modules their pruned sizes, with fresh weights, in place.

    Args:
        widths: sizes of each narrowed module, as `widths_of` returns them.
        layer_norm_widths: original width of each narrowed LayerNorm and global response norm.
        layer_norm: form of narrowed LayerNorms, see `norms.narrowed`.

    Raises:
        UserError: if a name is not in the network, or its module cannot be narrowed.
    """
    modules = dict(network.named_modules())
    for name, size in widths.items():
        module = modules.get(name)
        if isinstance(module, CHANNEL_NORMS) and module.weight is not None:
            original, described = len(module.weight), layer_norm_widths.get(name)
            if described != original:
                raise UserError(f"{name}: the original width is {original}, but model.json says {described}")
            replace_module(network, name, narrowed(module, size["width"], layer_norm))
        elif module is not None and size.keys() <= module._parameters.keys():
            for attribute, length in size.items():  # vectors of the module's own, such as a learned scale
                old = getattr(module, attribute)
                setattr(module, attribute, nn.Parameter(torch.ones(length, *old.shape[1:])))
        else:
            replace_module(network, name, _resized(name, module, size))


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
    """Read the sizes of every module of `pruned` that differs from the module of the same name in `dense`.

    Returns:
        `widths` and `layer_norm_widths`, as `reshape` takes them.
    """
    widths, layer_norm_widths = {}, {}
    for name, module in pruned.named_modules():
        size, original = _size(module), _size(dense.get_submodule(name))
        if size == original:
            continue
        widths[name] = size
        if isinstance(module, CHANNEL_NORMS):
            layer_norm_widths[name] = original["width"]
    return widths, layer_norm_widths


def _size(module: nn.Module) -> dict[str, int]:
    """A module's sizes, read off its tensors: a pruner that cuts tensors may not update the attributes."""
    weight: torch.Tensor = getattr(module, "weight", None)
    match module:
        case nn.Linear():
            return {"in_features": weight.shape[1], "out_features": weight.shape[0]}
        case nn.Conv2d():
            groups = module.groups
            if groups > 1:  # pruning removes whole groups with their outputs; the size of a group stays
                groups = weight.shape[0] * groups // module.out_channels
            return {"in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0], "groups": groups}
        case _BatchNorm():
            return {"num_features": len(weight if weight is not None else module.running_mean)}
        case nn.LayerNorm() | FixedDivisorLayerNorm() | GlobalResponseNorm():
            return {} if weight is None else {"width": len(weight)}
    return {name: len(p) for name, p in module.named_parameters(recurse=False) if p.dim()}

"""Bring a freshly built network to the widths that pruning left, and read those widths off a pruned one."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common.errors import UserError
from stages.networks.layer_norm import CountingLayerNorm, counting
from stages.networks.pointwise import replace_module


def reshape(network: nn.Module, widths: dict[str, dict[str, int]], layer_norm_widths: dict[str, int]) -> None:
    """Give the named modules their pruned sizes, with fresh weights, in place.

    Args:
        widths: for each narrowed module, the attributes that `widths_of` reads.
        layer_norm_widths: the original width of each narrowed LayerNorm.

    Raises:
        UserError: if a name is not in the network or its module cannot be narrowed.
    """
    modules = dict(network.named_modules())
    for name, size in widths.items():
        module = modules.get(name)
        match module:
            case nn.Linear():
                new = nn.Linear(size["in_features"], size["out_features"], bias=module.bias is not None)
            case nn.Conv2d():
                new = nn.Conv2d(
                    size["in_channels"],
                    size["out_channels"],
                    module.kernel_size,
                    module.stride,
                    module.padding,
                    module.dilation,
                    size["groups"],
                    bias=module.bias is not None,
                    padding_mode=module.padding_mode,
                )
            case _BatchNorm():
                new = type(module)(size["num_features"], module.eps, module.momentum, module.affine, module.track_running_stats)
            case nn.LayerNorm():
                if layer_norm_widths.get(name) != module.normalized_shape[0]:
                    raise UserError(
                        f"{name}: its original width is {module.normalized_shape[0]}, the file says {layer_norm_widths.get(name)}"
                    )
                new = counting(module, size["width"])
            case _:
                raise UserError(f"{name}: {'no such module' if module is None else type(module).__name__} cannot be narrowed")
        replace_module(network, name, new)


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
        if isinstance(module, nn.LayerNorm | CountingLayerNorm):
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
            if groups > 1 and groups == module.in_channels:  # depthwise: one group for each channel that is left
                groups = weight.shape[0] * module.in_channels // module.out_channels
            return {"in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0], "groups": groups}
        case _BatchNorm():
            return {"num_features": len(weight if weight is not None else module.running_mean)}
        case nn.LayerNorm() | CountingLayerNorm():
            return {"width": len(weight)}
    return None

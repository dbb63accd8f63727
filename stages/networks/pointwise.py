"""1x1 convolutions as the Linear layers that they are, so that what acts on Linear acts on them too."""

import copy
from collections.abc import Callable

import torch
from torch import nn


class PointwiseLinear(nn.Module):
    """A 1x1 convolution computed as a Linear layer over the channels: `[N, C, H, W]` in and out."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def is_pointwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), 0, "valid", "same")
        and module.groups == 1
    )


@torch.no_grad()
def pointwise_to_linear(network: nn.Module) -> None:
    """Replace every 1x1 convolution (stride 1, one group, no padding) in place; outputs stay the same."""
    for name, module in list(network.named_modules()):
        if is_pointwise(module):
            linear = nn.Linear(module.in_channels, module.out_channels, bias=module.bias is not None)
            linear.weight.copy_(module.weight.flatten(1))
            if module.bias is not None:
                linear.bias.copy_(module.bias)
            replace_module(network, name, PointwiseLinear(linear))


def with_twins(network: nn.Module, kind: type, twin_of: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy in which every module of a kind is replaced by what `twin_of` makes of it."""
    copied = copy.deepcopy(network)
    twins: dict[nn.Module, nn.Module] = {}
    for name, module in list(copied.named_modules(remove_duplicate=False)):  # one that is used twice has two names
        if isinstance(module, kind):
            if module not in twins:
                twins[module] = twin_of(module)
            replace_module(copied, name, twins[module])
    return copied


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name`, in the training mode of the one that was there."""
    module.train(network.get_submodule(name).training)
    network.set_submodule(name, module)

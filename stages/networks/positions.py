"""How often each weight is applied to one image: what makes MACs of parameters."""

import torch
from torch import nn


@torch.no_grad()
def output_positions(network: nn.Module, input_size: int) -> dict[str, int]:
    """How often the weight of each Conv2d and Linear layer is applied to one image of `[3, input_size, input_size]`.

    The network is left as it is: one pass in evaluation mode, its training mode restored. A weight's MACs are its
    numel times this.

    Returns:
        By the weight's name in `named_parameters`; layers that are not reached are missing.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    positions: dict[str, int] = {}

    def count(module: nn.Module, _: tuple, output: torch.Tensor) -> None:
        name = names[id(module.weight)]
        positions[name] = positions.get(name, 0) + output.numel() // module.weight.shape[0]

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    training = {module: module.training for module in network.modules()}
    one = next(network.parameters())
    try:
        network.eval()(torch.zeros(1, 3, input_size, input_size, device=one.device, dtype=one.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return positions

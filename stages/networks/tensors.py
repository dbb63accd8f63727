"""Tensors beside their modules: loading them by name, and one value for each output channel."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn


def load_tensors(network: nn.Module, tensors: Mapping[str, torch.Tensor], strict: bool = True) -> None:
    """As `network.load_state_dict`, for tensors that come without their modules' versions.

    A plain mapping carries none, and some modules (torchvision's MNASNet) refuse to load without: the tensors are
    taken for those of the network's own versions, as all that this program builds and stores are.
    """
    state = OrderedDict(tensors)
    state._metadata = network.state_dict()._metadata
    network.load_state_dict(state, strict)


def along_outputs(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`values` `[out]` in a shape that broadcasts over a weight `[out, ...]`."""
    return values.view(-1, *[1] * (weight.dim() - 1))

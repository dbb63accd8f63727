"""Tensors by name, as files and checkpoints hold them, into a network."""

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

"""Exact parameters and MACs of a partly pruned network, from the channels left in each group, without cutting it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stages.networks.modules import output_positions
from stages.pruning.groups import ChannelGroup


@dataclass(frozen=True)
class Costs:
    """Parameters and MACs as functions of the channels left in each of G groups.

    Cutting channels of group g scales a parameter that g makes (axis 0) or reads (axis 1) by the fraction of channels
    that is left. Both counts are sums over the N parameters of numel x fraction on axis 0 x fraction on axis 1 (x
    output positions, for MACs). This also holds where a channel is a run of entries, and for depthwise and grouped
    convolutions, whose axis 1 counts the inputs of one output only.
    """

    params_dense: int
    """Parameters of the whole network."""
    macs_dense: int
    """Multiply-accumulates of its Conv2d and Linear layers for one image; biases and all else are not counted."""
    _makes: torch.Tensor
    """int64 `[N]`: the group on each parameter's axis 0, or G for none."""
    _reads: torch.Tensor
    """int64 `[N]`: the group on its axis 1, or G for none."""
    _params: torch.Tensor
    """float64 `[N]`: numel for one channel on each axis. It is a whole number, so that sums are exact."""
    _macs: torch.Tensor
    """float64 `[N]`: the same times the output positions."""

    def params(self, kept: torch.Tensor) -> torch.Tensor:
        """Parameters (float64 `[...]`) with `kept` channels (int64 `[..., G]`, on the CPU) left in each group."""
        return self._total(self._params, kept)

    def macs(self, kept: torch.Tensor) -> torch.Tensor:
        """MACs (float64 `[...]`) with `kept` channels (int64 `[..., G]`, on the CPU) left in each group."""
        return self._total(self._macs, kept)

    def _total(self, unit: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        left = torch.cat([kept.double(), torch.ones(*kept.shape[:-1], 1, dtype=torch.float64)], -1)
        return (unit * left[..., self._makes] * left[..., self._reads]).sum(-1)


def costs_of(network: nn.Module, groups: Sequence[ChannelGroup], input_size: int) -> Costs:
    """Measure a network in one forward pass.

    Args:
        network: On any device; it stays as it is.
        input_size: Side S of its input `[N, C, S, S]`, in pixels.
    """
    positions = output_positions(network, input_size)
    makes = {part.name: index for index, group in enumerate(groups) for part in group.makes}
    reads = {part.name: index for index, group in enumerate(groups) for part in group.reads}
    widths = [group.channels for group in groups] + [1]
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    made, read = (torch.tensor([owner.get(name, len(groups)) for name in sizes]) for owner in (makes, reads))
    one_channel = torch.tensor(widths, dtype=torch.float64)[made] * torch.tensor(widths)[read]
    numel = torch.tensor([*sizes.values()])
    macs = numel * torch.tensor([positions.get(name, 0) for name in sizes])
    return Costs(int(numel.sum()), int(macs.sum()), made, read, numel / one_channel, macs / one_channel)

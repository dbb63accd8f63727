"""A number for each channel, laid over all that makes it, in the form that runs fastest on the device at hand."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from stages.networks.modules import along_outputs
from stages.pruning.groups import ChannelGroup


class ChannelMask:
    """Scales channels in place, without index lists and without waiting for the device.

    On the CPU a mask is one number for each row of a parameter, broadcast: rows are multiplied as fast as memory
    allows, twice as fast as they are filled by index. Elsewhere it has the parameter's full shape and memory order, so
    that torch takes many parameters in one kernel.

    Args:
        groups: of C channels in all; parameters are found in `parameters` by the names in `makes`.
        values: float or bool `[C]`, all groups in one row.
        neutral: the value that leaves a channel as it is; groups that have no other are not touched.
        full: full shapes; by default wherever the parameters are not on the CPU.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[ChannelGroup],
        values: torch.Tensor,
        neutral: float,
        full: bool | None = None,
    ) -> None:
        self._parts: list[tuple[nn.Parameter, int]] = []
        self._masks: list[torch.Tensor] = []
        for group, of_group in zip(groups, values.split([group.channels for group in groups]), strict=True):
            if (of_group == neutral).all():
                continue
            for part in group.makes:
                parameter = parameters[part.name]
                by_channel = _by_channel(parameter, part.repeat)
                mask = along_outputs(of_group.to(parameter), by_channel)
                if parameter.device.type != "cpu" if full is None else full:
                    mask = torch.empty_like(by_channel).copy_(mask)
                self._parts.append((parameter, part.repeat))
                self._masks.append(mask)

    @torch.no_grad()
    def multiply(self) -> None:
        """Multiply each channel by its value: exactly zero where that is 0, unchanged where it is 1."""
        if self._masks:
            torch._foreach_mul_([_by_channel(*part) for part in self._parts], self._masks)

    @torch.no_grad()
    def subtract(self, share: float) -> None:
        """Take `share` x value of each channel away: exactly zero where both are 1, unchanged where the value is 0."""
        if self._masks:
            channels = [_by_channel(*part) for part in self._parts]
            torch._foreach_addcmul_(channels, channels, self._masks, -share)


def _by_channel(parameter: nn.Parameter, repeat: int) -> torch.Tensor:
    """A view with the channel as first axis: where a channel is a run of entries, these become the second."""
    return parameter if repeat == 1 else parameter.unflatten(0, (-1, repeat))

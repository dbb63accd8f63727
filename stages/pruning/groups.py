"""Channel groups: the channels that can only be removed together, and the network that their removal leaves.

Some parameters make a channel (a convolution's rows, the norms behind it, every layer that adds to the same residual
stream) and others read it (the columns of the layers that follow). If all that makes a channel is zero, the channel is
zero for every input (a zero-invariant group, arXiv 2107.07467), and cutting it out changes nothing.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common.errors import UserError
from stages.networks.build import build_network
from stages.networks.modules import load_tensors
from stages.networks.reshape import widths_of
from stages.networks.spec import NetworkSpec

PARTIAL_REMEDY = " (`allow_partial: true` leaves it whole and prunes the rest)"
PROBE_TOLERANCE = 1e-8
"""Largest difference, relative to the logits' scale, in float64: far above rounding, far below any real change."""


@dataclass(frozen=True)
class Slice:
    """One tensor's part in a group: channel `c` owns the entries `[c * repeat, (c + 1) * repeat)` along `axis`."""

    name: str
    """Name of the parameter or buffer in the network."""
    axis: int
    """0 if the tensor makes channels, 1 if it reads them."""
    repeat: int = 1
    """More than 1 if each channel is a run of entries: behind a flatten, or where the unit that can go is a group of a
    convolution, with all its inputs and outputs."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can be removed one by one, each with all that belongs to it."""

    name: str
    """Name of the first layer, in the network's order, that makes these channels."""
    channels: int
    """Number of units that can be removed: single channels, or the groups of a grouped convolution."""
    makes: tuple[Slice, ...]
    """Parameters that are zero where a channel is pruned, and from which its importance is measured."""
    reads: tuple[Slice, ...]
    """Weights that are cut with the channel that they read; their values do not matter once it is zero."""
    buffers: tuple[Slice, ...]
    """Running statistics, which are cut but never zeroed."""


def entries(channels: torch.Tensor, repeat: int) -> torch.Tensor:
    """Indices of the entries that belong to some channels: int64 `[n * repeat]` for int64 `[n]`."""
    if repeat == 1:
        return channels
    return (channels[:, None] * repeat + torch.arange(repeat, device=channels.device)).flatten()


def by_group(groups: Sequence[ChannelGroup], channels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Split one row over all groups' channels, `[C]`, into `[channels]` for each group by name."""
    widths = [group.channels for group in groups]
    return dict(zip((group.name for group in groups), channels.split(widths), strict=True))


@torch.no_grad()
def zero_channels(network: nn.Module, groups: Sequence[ChannelGroup], pruned: Mapping[str, torch.Tensor]) -> None:
    """Set all that makes the pruned channels to zero, in place.

    Args:
        pruned: bool `[channels]` for each group by name.
    """
    parameters = dict(network.named_parameters())
    for group in groups:
        gone = pruned[group.name].nonzero().flatten()
        for part in group.makes:
            parameter = parameters[part.name]
            parameter.index_fill_(part.axis, entries(gone, part.repeat).to(parameter.device), 0)


@torch.no_grad()
def cut_channels(
    network: nn.Module, spec: NetworkSpec, groups: Sequence[ChannelGroup], pruned: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, NetworkSpec]:
    """The physically smaller network without the pruned channels, and the spec that builds it.

    Args:
        network: The network of `spec`, with layer scale folded; it stays as it is.
        pruned: bool `[channels]` for each group by name; at least one channel of each stays.

    Returns:
        The smaller network, in evaluation mode on the CPU. It equals `network` where the pruned channels are zero,
        unless `spec.layer_norm` is `plain` and a LayerNorm was cut.
    """
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    for group in groups:
        gone = pruned[group.name].cpu()
        if not gone.any():
            continue
        kept = (~gone).nonzero().flatten()
        for part in group.makes + group.reads + group.buffers:
            state[part.name] = state[part.name].index_select(part.axis, entries(kept, part.repeat))
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    narrow = copy.deepcopy(network, shared)  # copies modules, not tensors: the cut ones replace them
    for name, tensor in state.items():
        path, _, attribute = name.rpartition(".")
        owner = narrow.get_submodule(path)
        setattr(owner, attribute, nn.Parameter(tensor) if attribute in owner._parameters else tensor)
    widths, layer_norm_widths = widths_of(narrow, network)
    spec = replace(spec, widths=widths, layer_norm_widths=layer_norm_widths)
    subnet = build_network(spec).to(next(network.parameters()).dtype)
    load_tensors(subnet, state)
    return subnet.eval(), spec


@torch.no_grad()
def relative_difference(one: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    """Largest absolute difference of the logits of two networks, over the largest absolute logit of the first."""
    expected = one(x)
    return float((other(x) - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(x.dtype).tiny))


def check_exact(network: nn.Module, spec: NetworkSpec, groups: Sequence[ChannelGroup], input_size: int) -> None:
    """Prove on a copy, before any training, that cutting zeroed channels changes nothing.

    Raises:
        UserError: With the names of the layers whose channels cannot be cut exactly.
    """
    if culprits := inexact_groups(network, spec, groups, input_size):
        raise UserError(
            f"{spec.library} {spec.architecture}: removing zeroed channels of {', '.join(culprits[:5])}"
            f"{f' and {len(culprits) - 5} more' if len(culprits) > 5 else ''} would change the output (behind it lies"
            " something that is not zero for a zero input, or an operation that mixes channels): not pruned"
            + (PARTIAL_REMEDY if len(culprits) < len(groups) else "")
        )


def inexact_groups(network: nn.Module, spec: NetworkSpec, groups: Sequence[ChannelGroup], input_size: int) -> list[str]:
    """Names of the groups that must stay whole, so that all others can be cut exactly.

    The proof cuts half of the channels from a copy in float64. Its biases, norms and running statistics are random,
    since the values of a fresh network, 0 and 1, would hide a difference.
    """
    x = torch.randn(
        2, spec.channels, input_size, input_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    exact_spec = replace(spec, layer_norm="exact")

    def differs(some: Sequence[ChannelGroup]) -> bool:
        generator = torch.Generator().manual_seed(0)
        zeroed = copy.deepcopy(network).cpu().double().eval()
        _randomize(zeroed, generator)
        pruned = {group.name: torch.zeros(group.channels, dtype=torch.bool) for group in groups}
        for group in some:
            pruned[group.name] = torch.rand(group.channels, generator=generator).argsort() < group.channels // 2
        zero_channels(zeroed, groups, pruned)
        try:
            subnet, _ = cut_channels(zeroed, exact_spec, groups, pruned)
            return not relative_difference(zeroed, subnet, x) < PROBE_TOLERANCE
        except (RuntimeError, UserError):  # shapes do not fit each other, or a module cannot be narrowed
            return True

    if not differs(groups):
        return []
    culprits = [group.name for group in groups if differs([group])]
    exact = [group for group in groups if group.name not in culprits]
    if differs(exact):  # each alone is exact, but not together: add them one by one
        together: list[ChannelGroup] = []
        for group in exact:
            (culprits.append(group.name) if differs([*together, group]) else together.append(group))
    return culprits


@torch.no_grad()
def _randomize(network: nn.Module, generator: torch.Generator) -> None:
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.normal_(0.5, 0.3, generator=generator)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)

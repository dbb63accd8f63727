"""Networks to cut, with weights away from their neutral values, real images, and a random choice of channels."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.networks.build import build_network
from stages.networks.reparameterize import fold_layer_scale
from stages.networks.reshape import reshape
from stages.networks.spec import NetworkSpec
from stages.pruning.groups import ChannelGroup

SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 24)}
TOY = NetworkSpec("timm", "toy", {}, classes=4)


@torch.no_grad()
def randomize(network: nn.Module) -> nn.Module:
    """Set random weights, such that no bias, norm or statistic is at its neutral value."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.normal_(0.6, 0.3)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.8, 1.5)
    return network.eval()


def folded(library: str, architecture: str, arguments: dict, channels: int = 3) -> tuple[nn.Module, NetworkSpec]:
    spec = NetworkSpec(library, architecture, arguments, classes=5, channels=channels)
    network = randomize(build_network(spec))
    fold_layer_scale(network)
    return network, replace(spec, layer_scale_folded=True)


def random_half(groups: Sequence[ChannelGroup]) -> dict[str, torch.Tensor]:
    return {group.name: torch.rand(group.channels).argsort() < group.channels // 2 for group in groups}


def digits(size: int) -> torch.Tensor:
    """Four handwritten digits, normalized, `[4, 3, size, size]`."""
    images = torch.from_numpy(load_digits().images[:4]).float()[:, None] / 8 - 1
    return F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()


def builder(make: Callable[[], nn.Module]) -> Callable[[NetworkSpec], nn.Module]:
    """A replacement of `build_network` for the test's own network, at the widths of a spec."""

    def build(spec: NetworkSpec) -> nn.Module:
        network = make()
        reshape(network, spec.widths, spec.layer_norm_widths, spec.layer_norm)
        return network

    return build

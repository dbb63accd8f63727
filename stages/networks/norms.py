"""Norms over channels that keep the divisor of their original width after pruning removed channels.

Pruning proves that a removed channel is zero everywhere, but a zero still counts in a norm's mean and variance. A plain
norm of the remaining `w` channels therefore gives another output than the dense norm of `d` channels. These classes
divide by `d`, so that the pruned network gives the output of the network with zeros.
"""

import copy

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d


class FixedDivisorLayerNorm(nn.Module):
    """A LayerNorm whose mean and variance divide by the original width d instead of the width w of its input.

    y_i = (x_i - m) / sqrt(v + eps) * weight_i + bias_i for i = 1..w, with m = sum(x) / d and
    v = (sum((x - m)^2) + (d - w) m^2) / d: each of the d - w removed channels is a zero, which lies m away from the
    mean. The fused operator computes it on the input padded with zeros to the width d.

    Args:
        width: channels w of the input.
        original_width: channels d before pruning.
        eps: as in `torch.nn.LayerNorm`.
        channels_first: normalize axis 1 of `[N, C, H, W]` instead of the last axis.
        bias: as in `torch.nn.LayerNorm`.
    """

    def __init__(self, width: int, original_width: int, eps: float, channels_first: bool, bias: bool = True) -> None:
        super().__init__()
        self.width, self.original_width, self.eps, self.channels_first = width, original_width, eps, channels_first
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)
        missing = (0, self.original_width - self.width)
        weight, bias = F.pad(self.weight, missing), None if self.bias is None else F.pad(self.bias, missing)
        x = F.layer_norm(F.pad(x, missing), (self.original_width,), weight, bias, self.eps)[..., : self.width]
        return x.permute(0, 3, 1, 2) if self.channels_first else x


class FixedDivisorGlobalResponseNorm(GlobalResponseNorm):
    """Global response normalization (ConvNeXt V2, arXiv 2301.00808) whose mean divides by the original width.

    Equation 2 divides each channel's norm over the image by the mean of all channels' norms; here that mean is their
    sum / `original_width`.

    Args:
        channels_last: the input is `[N, H, W, C]` instead of `[N, C, H, W]`.
    """

    def __init__(self, width: int, original_width: int, eps: float, channels_last: bool) -> None:
        super().__init__(width, eps, channels_last)
        self.original_width = original_width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        mean = norm.sum(self.channel_dim, keepdim=True) / self.original_width
        weight, bias = self.weight.view(self.wb_shape), self.bias.view(self.wb_shape)
        return x + torch.addcmul(bias, weight, x * (norm / (mean + self.eps)))


CHANNEL_NORMS = (nn.LayerNorm, FixedDivisorLayerNorm, GlobalResponseNorm)
"""Norms whose output depends on the number of channels, zeros included."""


def narrowed(norm: nn.Module, width: int, form: str = "exact") -> nn.Module:
    """`norm` at `width` channels with fresh weights.

    Args:
        norm: a LayerNorm or a global response norm at its original width.
        form: `exact` keeps the divisor of the original width. `plain` makes a LayerNorm of the same class that divides
            by `width`; a global response norm is exact in any case, because that costs no time.
    """
    if isinstance(norm, GlobalResponseNorm):
        return FixedDivisorGlobalResponseNorm(width, len(norm.weight), norm.eps, channels_last=norm.channel_dim == -1)
    if form == "exact":
        channels_first = isinstance(norm, TimmLayerNorm2d | TorchvisionLayerNorm2d)
        original_width = norm.normalized_shape[0]
        return FixedDivisorLayerNorm(width, original_width, norm.eps, channels_first, norm.bias is not None)
    plain = copy.deepcopy(norm)
    plain.normalized_shape = (width,)
    plain.weight = nn.Parameter(torch.empty(width))
    plain.bias = None if norm.bias is None else nn.Parameter(torch.empty(width))
    plain.reset_parameters()
    return plain

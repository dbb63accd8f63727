"""LayerNorm that goes on dividing by its original width after channels were removed.

Zeroed channels still count in a LayerNorm's mean and variance; removed ones do not, so plain removal changes the
output. The zeros are therefore put back around the fused operator: pad to the original width, normalise, cut.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from torch import nn
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d


class CountingLayerNorm(nn.Module):
    """LayerNorm over `width` channels that counts `original_width`: the missing ones are zeros.

    Args:
        width: channels that are left.
        original_width: channels that mean and variance are taken over.
        eps: as in `torch.nn.LayerNorm`.
        channels_first: normalise axis 1 of `[N, C, H, W]` instead of the last axis.
    """

    def __init__(self, width: int, original_width: int, eps: float, channels_first: bool) -> None:
        super().__init__()
        self.width, self.original_width, self.eps, self.channels_first = width, original_width, eps, channels_first
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)
        missing = (0, self.original_width - self.width)
        x = F.layer_norm(
            F.pad(x, missing), (self.original_width,), F.pad(self.weight, missing), F.pad(self.bias, missing), self.eps
        )[..., : self.width]
        return x.permute(0, 3, 1, 2) if self.channels_first else x

    def extra_repr(self) -> str:
        return f"{self.width} of {self.original_width}, eps={self.eps}, channels_first={self.channels_first}"


def is_channels_first(norm: nn.LayerNorm) -> bool:
    return isinstance(norm, TimmLayerNorm2d | TorchvisionLayerNorm2d)


def counting(norm: nn.LayerNorm, width: int) -> CountingLayerNorm:
    """The counting form of `norm` at `width` channels, with fresh weights."""
    return CountingLayerNorm(width, norm.normalized_shape[0], norm.eps, is_channels_first(norm))

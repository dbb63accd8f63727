"""Global response normalisation (ConvNeXt V2, arXiv 2301.00808) that goes on counting its original width.

It divides each channel's norm by the mean of all channels' norms (equation 2). Zeroed channels count in that mean,
removed ones do not, so the sum is divided by the original width: exact, and as cheap as the plain form.
"""

import torch
from timm.layers.grn import GlobalResponseNorm


class CountingGlobalResponseNorm(GlobalResponseNorm):
    """GRN over `width` channels whose mean counts `original_width`: the missing ones are zeros.

    Args:
        channels_last: `[N, H, W, C]` instead of `[N, C, H, W]`.
    """

    def __init__(self, width: int, original_width: int, eps: float, channels_last: bool) -> None:
        super().__init__(width, eps, channels_last)
        self.width, self.original_width = width, original_width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        mean = norm.sum(self.channel_dim, keepdim=True) / self.original_width
        weight, bias = self.weight.view(self.wb_shape), self.bias.view(self.wb_shape)
        return x + torch.addcmul(bias, weight, x * (norm / (mean + self.eps)))

    def extra_repr(self) -> str:
        return f"{self.width} of {self.original_width}, eps={self.eps}"


def counting_grn(grn: GlobalResponseNorm, width: int) -> CountingGlobalResponseNorm:
    """The counting form of `grn` at `width` channels, with fresh weights."""
    return CountingGlobalResponseNorm(width, len(grn.weight), grn.eps, channels_last=grn.channel_dim == -1)

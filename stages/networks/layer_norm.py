"""LayerNorm that goes on dividing by its original width after channels were removed.

Zeroed channels still count in a LayerNorm's mean and variance; removed ones do not, so plain removal changes the
output. The counting forms keep it: `exact` puts the zeros back around the fused operator (pad to the original width,
normalise, cut), `exact_matmul` takes the two sums as matrix products with a constant vector. `plain` does not count.
All three have the same parameters.
"""

import copy

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from torch import nn
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from stages.common.errors import UserError

FORMS = ("exact", "exact_matmul", "plain")


class FixedDivisorLayerNorm(nn.Module):
    """LayerNorm over `width` channels that counts `original_width`: the missing ones are zeros.

    Args:
        width: channels that are left.
        original_width: channels that mean and variance are taken over.
        eps: as in `torch.nn.LayerNorm`.
        channels_first: normalise axis 1 of `[N, C, H, W]` instead of the last axis.
        as_matmul: in evaluation and export, sum by matrix products instead of padding. Training pads in any case:
            there the fused operator is faster, and autocast would round the products to bfloat16.
        bias: as in `torch.nn.LayerNorm`.
    """

    def __init__(
        self,
        width: int,
        original_width: int,
        eps: float,
        channels_first: bool,
        as_matmul: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.original_width, self.eps, self.channels_first = width, original_width, eps, channels_first
        self.as_matmul = as_matmul
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)
        by_products = self.as_matmul and not self.training and not torch.is_autocast_enabled(x.device.type)
        x = self._by_products(x) if by_products else self._by_padding(x)
        return x.permute(0, 3, 1, 2) if self.channels_first else x

    def _by_padding(self, x: torch.Tensor) -> torch.Tensor:
        missing = (0, self.original_width - self.width)
        bias = None if self.bias is None else F.pad(self.bias, missing)
        weight = F.pad(self.weight, missing)
        return F.layer_norm(F.pad(x, missing), (self.original_width,), weight, bias, self.eps)[..., : self.width]

    def _by_products(self, x: torch.Tensor) -> torch.Tensor:
        """Centred before it is squared: the mean of squares less the squared mean would cancel in float32."""
        share = x.new_full((self.width, 1), 1 / self.original_width)
        mean = x @ share
        x = x - mean
        missing = 1 - self.width / self.original_width  # each missing zero is `mean` away from the mean
        variance = (x * x) @ share + missing * mean * mean
        x = x * torch.rsqrt(variance + self.eps) * self.weight
        return x if self.bias is None else x + self.bias

    def extra_repr(self) -> str:
        form = ", as_matmul" if self.as_matmul else ""
        return f"{self.width} of {self.original_width}, eps={self.eps}, channels_first={self.channels_first}{form}"


def is_channels_first(norm: nn.LayerNorm) -> bool:
    return isinstance(norm, TimmLayerNorm2d | TorchvisionLayerNorm2d)


def counting(norm: nn.LayerNorm, width: int, as_matmul: bool = False) -> FixedDivisorLayerNorm:
    """The counting form of `norm` at `width` channels, with fresh weights."""
    original, channels_first = norm.normalized_shape[0], is_channels_first(norm)
    return FixedDivisorLayerNorm(width, original, norm.eps, channels_first, as_matmul, norm.bias is not None)


def narrowed(norm: nn.LayerNorm, width: int, form: str) -> nn.Module:
    """`norm` at `width` channels in one of `FORMS`, with fresh weights; `plain` stays of its own class.

    Raises:
        UserError: if there is no such form.
    """
    if form not in FORMS:
        raise UserError(f"layer_norm = {form!r}: no such form of a cut LayerNorm; one of {', '.join(FORMS)}")
    if form != "plain":
        return counting(norm, width, form == "exact_matmul")
    plain = copy.deepcopy(norm)
    plain.normalized_shape = (width,)
    plain.weight = nn.Parameter(torch.empty(width))
    plain.bias = None if norm.bias is None else nn.Parameter(torch.empty(width))
    plain.reset_parameters()
    return plain

"""Quantization-aware recovery: training while the forward pass rounds the weights (straight-through gradients).

Scales are trained with the weights, as learned step sizes (LSQ, arXiv 1902.08153, equations 1 to 3). The gradient
scale of section 2.2 there matters with SGD alone: AdamW, which trains the scales under the recipes of AdamW and Muon,
divides a gradient by its own size, so that the factor cancels.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from stages.artifacts.packing import limits
from stages.networks.modules import along_outputs, load_tensors
from stages.quantization.rounding import Rounded
from stages.training.session import Session


class _RoundingWeight(nn.Module):
    """Mixin for a float layer that rounds its weight in every forward pass."""

    bits: int
    weight: torch.Tensor
    kept: torch.Tensor

    def _start(self, rounded: Rounded) -> None:
        self.bits = rounded.bits
        self.weight_scale = nn.Parameter(rounded.scale.clone())
        self.register_buffer("kept", self.weight.detach() != 0, persistent=False)

    def _scale(self) -> torch.Tensor:
        """The trained scale, always above zero."""
        return self.weight_scale.abs().clamp_min(torch.finfo(torch.float32).tiny)

    def rounded_weight(self) -> torch.Tensor:
        """The weight as its integers will represent it; weights that were zero before stay zero."""
        low, high = limits(self.bits)
        factor = (self.weight[0].numel() * high) ** -0.5  # of the scale's gradient
        scale = self._scale()
        scale = along_outputs(scale * factor + (scale * (1 - factor)).detach(), self.weight)
        within = (self.weight * self.kept / scale).clamp(low, high)
        return (within + (within.round() - within).detach()) * scale

    @torch.no_grad()
    def rounded(self) -> Rounded:
        scale = self._scale()
        steps = self.weight * self.kept / along_outputs(scale, self.weight)
        return Rounded(steps.clamp(*limits(self.bits)).round().to(torch.int8), scale, self.bits)


class RoundingLinear(_RoundingWeight, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.rounded_weight(), self.bias)


class RoundingConv2d(_RoundingWeight, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.rounded_weight(), self.bias)


KINDS = {nn.Linear: RoundingLinear, nn.Conv2d: RoundingConv2d}


def recover(
    session: Session, rounded: Mapping[str, Rounded]
) -> tuple[nn.Module, dict[str, Rounded], list[dict[str, float]]]:
    """Train a copy of the session's network with rounded weights.

    Args:
        rounded: Bits and first scale of each layer by name. Training starts from the float weights.

    Returns:
        A float network with all other trained tensors, the rounded weights, and the training curve.
    """
    student = copy.deepcopy(session.network)
    for name, start in rounded.items():
        layer = student.get_submodule(name)
        layer.__class__ = KINDS[type(layer)]
        layer._start(start)
    trained = session.train(student)
    found = {name: trained.network.get_submodule(name).rounded() for name in rounded}
    plain = copy.deepcopy(session.network)
    state = trained.network.state_dict()
    load_tensors(plain, {name: state[name] for name in plain.state_dict()})
    return plain, found, trained.curve

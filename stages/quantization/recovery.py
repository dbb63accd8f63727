"""Quantization-aware recovery: train on while the forward pass rounds the weights, gradients going straight through.

Scales are trained with the weights, as learned step sizes (LSQ, arXiv 1902.08153, equations 1 to 3). Their gradients
are made smaller by the factor of section 2.2 there, which tells with SGD alone: AdamW, which moves scales under the
recipes of AdamW and of Muon, divides a gradient by its own size, so that the factor cancels.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from stages.artifacts.packing import limits
from stages.datasets.store import Part
from stages.networks.modules import along_outputs, load_tensors
from stages.networks.preprocess import Preprocess
from stages.params.quantizers import Bits
from stages.params.whole import Params
from stages.quantization.rounding import Rounded
from stages.training.distillation import Distillation
from stages.training.recipe import recipe_for
from stages.training.trainer import Trained, train


class _RoundingWeight:
    """Mixed into a float layer: its weight is rounded in every forward pass."""

    bits: int

    def _start(self, rounded: Rounded) -> None:
        self.bits = rounded.bits
        self.weight_scale = nn.Parameter(rounded.scale.clone())
        self.register_buffer("kept", self.weight.detach() != 0, persistent=False)

    def _scale(self) -> torch.Tensor:
        """Above zero, wherever training takes it."""
        return self.weight_scale.abs().clamp_min(torch.finfo(torch.float32).tiny)

    def rounded_weight(self) -> torch.Tensor:
        """The weight as its integers will give it; zeros that were there before stay."""
        low, high = limits(self.bits)
        share = (self.weight[0].numel() * high) ** -0.5  # of the scale's gradient
        scale = self._scale()
        scale = along_outputs(scale * share + (scale * (1 - share)).detach(), self.weight)
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
    network: nn.Module,
    rounded: Mapping[str, Rounded],
    quantizer: Bits,
    params: Params,
    parts: tuple[Part, Part],
    preprocess: Preprocess,
    *,
    seed: int,
    title: str,
    rate_key: str,
    checkpoints: Path | None,
) -> tuple[nn.Module, dict[str, Rounded], Trained]:
    """Train the network with rounded weights, the float network teaching.

    Args:
        network: float; left as it is.
        rounded: for each layer by name its bits and the scale that it begins with; its weight begins as the float one.
        parts: to train on and to validate on.

    Returns:
        A float network with what was trained beside the rounded weights, those weights, and how the training went.
    """
    student = copy.deepcopy(network)
    for name, found in rounded.items():
        layer = student.get_submodule(name)
        layer.__class__ = KINDS[type(layer)]
        layer._start(found)
    distillation = None
    if quantizer.distillation:
        distillation = Distillation(copy.deepcopy(network), quantizer.distillation, quantizer.distillation_temperature)
    trained = train(
        student,
        *parts,
        preprocess,
        recipe_for(params.finetune, quantizer),
        base=params.base,
        seed=seed,
        title=title,
        distillation=distillation,
        checkpoints=checkpoints,
        rate_key=rate_key,
    )
    found = {name: trained.network.get_submodule(name).rounded() for name in rounded}
    plain = copy.deepcopy(network)
    state = trained.network.state_dict()
    load_tensors(plain, {name: state[name] for name in plain.state_dict()})
    return plain, found, trained

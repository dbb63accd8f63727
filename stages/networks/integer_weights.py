"""Linear and convolution layers whose weights are integers of 2 to 8 bits with one scale for each output channel.

Where an input has a scale of its own (static quantization) it is rounded to that grid before the layer, as the exported
file does with QuantizeLinear; elsewhere activations stay float. The arithmetic is float on the values that the integers
stand for, so the layers run on any device and in any batch size alike.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from stages.networks.pointwise import with_twins
from stages.networks.tensors import along_outputs

ACTIVATION_LEVELS = 255
"""Largest uint8 value of a rounded activation."""


@dataclass(frozen=True)
class Grid:
    """uint8 steps of an activation: `(q - zero_point) * scale`."""

    scale: float
    zero_point: int

    @classmethod
    def over(cls, low: float, high: float) -> "Grid":
        """The grid that covers `[low, high]` and 0, which it holds exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / ACTIVATION_LEVELS, float(torch.finfo(torch.float32).tiny))
        return cls(scale, min(max(round(-low / scale), 0), ACTIVATION_LEVELS))

    @classmethod
    def of(cls, layer: nn.Module, side: str) -> "Grid":
        """The grid of an integer layer's `input` or `output`, which has one."""
        return cls(getattr(layer, f"{side}_scale").item(), int(getattr(layer, f"{side}_zero_point")))


class _IntegerWeight:
    """What the two kinds of layers share; mixed into a module with `weight` and `weight_scale` as buffers."""

    bits: int

    def _store(self, weight: torch.Tensor, scale: torch.Tensor, bits: int, grids: dict[str, Grid]) -> None:
        del self.weight
        self.bits = bits
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        for name in ("input", "output"):
            grid = grids.get(name)
            scale, zero_point = (None, None) if grid is None else (grid.scale, grid.zero_point)
            self.register_buffer(f"{name}_scale", scale and torch.tensor(scale, dtype=torch.float32))
            self.register_buffer(f"{name}_zero_point", scale and torch.tensor(zero_point, dtype=torch.uint8))

    def float_weight(self) -> torch.Tensor:
        """float32, of the weight's shape."""
        return self.weight * along_outputs(self.weight_scale, self.weight)

    def _on_grid(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = getattr(self, f"{name}_scale")
        if scale is None:
            return x
        zero_point = getattr(self, f"{name}_zero_point").float()
        return (torch.clamp(torch.round(x / scale) + zero_point, 0, ACTIVATION_LEVELS) - zero_point) * scale

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it holds: `weight` int8, `weight_scale` float32 `[out]`, and maybe `bias` and the grids."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}


class IntegerLinear(_IntegerWeight, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(self._on_grid(x, "input"), self.float_weight(), self.bias)
        return self._on_grid(y, "output")


class IntegerConv2d(_IntegerWeight, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._conv_forward(self._on_grid(x, "input"), self.float_weight(), self.bias)
        return self._on_grid(y, "output")


KINDS = {nn.Linear: IntegerLinear, nn.Conv2d: IntegerConv2d}
"""The float layers that have an integer form; subclasses compute something of their own and have none."""


def with_integers(
    layer: nn.Module, weight: torch.Tensor, scale: torch.Tensor, bits: int, grids: dict[str, Grid] | None = None
) -> nn.Module:
    """The integer form of a Linear or Conv2d layer, which is left as it is.

    Args:
        weight: int8 of the layer's shape, in [-2^(bits-1), 2^(bits-1) - 1].
        scale: float32 `[out]`.
        grids: of `input` and `output`, where they are rounded.
    """
    integer = copy.deepcopy(layer)
    integer.__class__ = KINDS[type(layer)]
    integer._store(weight, scale, bits, grids or {})
    return integer


def integer_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers with integer weights by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _IntegerWeight)}


@torch.no_grad()
def floating(layer: nn.Module) -> nn.Module:
    """The float layer whose weights are the values that the integers stand for; its activations are not rounded."""
    kind = next(plain for plain, integer in KINDS.items() if isinstance(layer, integer))
    twin = copy.deepcopy(layer)
    weight = nn.Parameter(layer.float_weight())
    for name in list(twin._buffers):
        delattr(twin, name)
    twin.__class__ = kind
    twin.weight = weight
    return twin


def without_integers(network: nn.Module) -> nn.Module:
    """A copy with every integer layer as a float one: what tools that know only torch's layers can look into."""
    return with_twins(network, _IntegerWeight, floating)

"""Linear and convolution layers with integer weights of 2 to 8 bits and one scale for each output channel.

With static quantization a layer rounds its input (and output) to a fixed grid, as QuantizeLinear does in the exported
file; otherwise activations stay float. The layers compute in float on the dequantized weights, so they give the same
result on any device and for any batch size.

"Packed" layers are these layers and PyTorch's dynamic int8 layers (`networks.dynamic_int8`).
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from stages.networks.dynamic_int8 import dynamic_layers, unpack_layer, without_dynamic
from stages.networks.modules import along_outputs, with_twins

ACTIVATION_LEVELS = 255
"""Largest uint8 value of a rounded activation."""


@dataclass(frozen=True)
class Grid:
    """Grid of a quantized activation: the uint8 value q stands for `(q - zero_point) * scale`."""

    scale: float
    zero_point: int

    @classmethod
    def over(cls, low: float, high: float) -> "Grid":
        """The grid that covers `[low, high]` and represents 0 exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / ACTIVATION_LEVELS, float(torch.finfo(torch.float32).tiny))
        return cls(scale, min(max(round(-low / scale), 0), ACTIVATION_LEVELS))

    @classmethod
    def of(cls, layer: nn.Module, side: str) -> "Grid":
        """The grid of an integer layer's `input` or `output`."""
        return cls(getattr(layer, f"{side}_scale").item(), int(getattr(layer, f"{side}_zero_point")))


class _IntegerWeight(nn.Module):
    """Base of the integer layers: `weight`, `weight_scale` and the grids are buffers."""

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
        """The dequantized weight, float32, in the weight's shape."""
        return self.weight * along_outputs(self.weight_scale, self.weight)

    def _on_grid(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = getattr(self, f"{name}_scale")
        if scale is None:
            return x
        zero_point = getattr(self, f"{name}_zero_point").float()
        return (torch.clamp(torch.round(x / scale) + zero_point, 0, ACTIVATION_LEVELS) - zero_point) * scale


class IntegerLinear(_IntegerWeight, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(self._on_grid(x, "input"), self.float_weight(), self.bias)
        return self._on_grid(y, "output")


class IntegerConv2d(_IntegerWeight, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._conv_forward(self._on_grid(x, "input"), self.float_weight(), self.bias)
        return self._on_grid(y, "output")


KINDS = {nn.Linear: IntegerLinear, nn.Conv2d: IntegerConv2d}
"""Float layers that have an integer form; their subclasses may compute something else and have none."""


def with_integers(
    layer: nn.Module, weight: torch.Tensor, scale: torch.Tensor, bits: int, grids: dict[str, Grid] | None = None
) -> nn.Module:
    """The integer form of a Linear or Conv2d layer; the layer itself is not changed.

    Args:
        weight: int8 of the layer's shape, in [-2^(bits-1), 2^(bits-1) - 1].
        scale: float32 `[out]`.
        grids: grids of `input` and `output`; a side without one stays float.
    """
    integer = copy.deepcopy(layer)
    integer.__class__ = KINDS[type(layer)]
    integer._store(weight, scale, bits, grids or {})
    return integer


def integer_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Layers with integer weights by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _IntegerWeight)}


@torch.no_grad()
def floating(layer: nn.Module) -> nn.Module:
    """The float layer with the dequantized weights; it does not round activations."""
    kind = next(plain for plain, integer in KINDS.items() if isinstance(layer, integer))
    twin = copy.deepcopy(layer)
    weight = nn.Parameter(layer.float_weight())
    for name in list(twin._buffers):
        delattr(twin, name)
    twin.__class__ = kind
    twin.weight = weight
    return twin


def without_integers(network: nn.Module) -> nn.Module:
    """A copy with a float layer for each integer layer, for tools that know only torch's layers."""
    return with_twins(network, _IntegerWeight, floating)


def packed_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Layers with integer weights, PyTorch's dynamic ones included, by name."""
    return dynamic_layers(network) | integer_layers(network)


def tensors_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """A packed layer's `weight` int8, `weight_scale` float32 `[out]` or `[1]`, and `bias` and grids if it has them."""
    return dict(layer.state_dict()) if isinstance(layer, _IntegerWeight) else unpack_layer(layer)


def dequantized(network: nn.Module) -> nn.Module:
    """A float copy: each packed layer becomes a plain layer with the dequantized weights."""
    return without_integers(without_dynamic(network))

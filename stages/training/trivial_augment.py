"""TrivialAugment over whole batches (arXiv 2103.10158, the wide space): one operation, one strength for each image.

torchvision's changes all images of a batch alike. Here those that drew the same operation are changed together, each by
its own strength; the operations are torchvision's to the pixel, but for ties in rounding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

BINS = 31
"""Strengths of each operation, evenly spaced over [0, 1]."""
SHIFT, TURN, SHEAR, BLEND = 32.0, 135.0, 0.99, 0.99
"""At strength 1: pixels, degrees, the tangent of the shear's angle, and the change of a blend's factor from 1."""
GREY = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Draws:
    """What each image of a batch is to undergo, on the CPU."""

    operation: torch.Tensor
    """int64 `[N]`: of `OPERATIONS`."""
    strength: torch.Tensor
    """float32 `[N]` in [-1, 1]; the sign is a direction, where the operation has one."""

    def __getitem__(self, index: torch.Tensor) -> "Draws":
        return Draws(self.operation[index], self.strength[index])


def draw(images: int, share: float, generator: torch.Generator) -> Draws:
    """An operation for each of `images` images; those that are not in `share` get the identity."""
    operation = torch.randint(len(OPERATIONS), (images,), generator=generator)
    strength = torch.randint(BINS, (images,), generator=generator) / (BINS - 1)
    sign = 2.0 * torch.randint(2, (images,), generator=generator) - 1
    chosen = torch.rand(images, generator=generator) < share
    return Draws(torch.where(chosen, operation, OPERATIONS.index("identity")), strength * sign)


def trivial_augment(pixels: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Change each image as drawn.

    Args:
        pixels: uint8 `[N, 3, S, S]`, on any device.
        draws: `[N]`.

    Returns:
        uint8 `[N, 3, S, S]`.
    """
    out = pixels.clone()
    moved = _index(draws.operation < len(MOVES))
    if len(moved):
        theta = _theta(draws[moved], pixels.shape[-1])
        on_device, theta = (tensor.to(pixels.device, non_blocking=True) for tensor in (moved, theta))
        grid = F.affine_grid(theta, (len(moved), *pixels.shape[1:]), align_corners=False)
        images = pixels[on_device].float()
        out[on_device] = F.grid_sample(images, grid, "nearest", "zeros", align_corners=False).to(torch.uint8)
    for number, name in enumerate(OPERATIONS[len(MOVES) :], len(MOVES)):
        index = _index(draws.operation == number)
        if name != "identity" and len(index):
            operands = (index, draws.strength[index].view(-1, 1, 1, 1))
            on_device, strength = (tensor.to(pixels.device, non_blocking=True) for tensor in operands)
            out[on_device] = COLOURS[name](pixels[on_device], strength)
    return out


def _index(marked: torch.Tensor) -> torch.Tensor:
    return marked.nonzero()[:, 0]


def _theta(draws: Draws, size: int) -> torch.Tensor:
    """float32 `[N, 2, 3]`: where pixels come from, in coordinates from -1 to 1. Shears leave the upper left corner."""
    shear, shift = SHEAR * draws.strength, 2 * (SHIFT * draws.strength).trunc() / size
    turn = (TURN * draws.strength).deg2rad()
    theta = torch.eye(2, 3).repeat(len(shear), 1, 1)
    of = {name: draws.operation == number for number, name in enumerate(MOVES)}
    theta[:, 0, 1:] += torch.where(of["shear_x"], shear, 0)[:, None]
    theta[:, 1, 0::2] += torch.where(of["shear_y"], shear, 0)[:, None]
    theta[:, 0, 2] -= torch.where(of["translate_x"], shift, 0)
    theta[:, 1, 2] -= torch.where(of["translate_y"], shift, 0)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2)
    theta[of["rotate"], :, :2] = rotation[of["rotate"]]
    return theta


def _blend(pixels: torch.Tensor, other: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Away from `other` by a factor of 1 + BLEND strength: at -1 hardly anything of the image is left."""
    factor = 1 + BLEND * strength
    return (factor * pixels + (1 - factor) * other).clamp(0, 255).to(torch.uint8)


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    red, green, blue = (share * pixels[:, [channel]] for channel, share in enumerate(GREY))
    return (red + green + blue).floor()


def _blurred(pixels: torch.Tensor) -> torch.Tensor:
    """By a 3x3 kernel with a heavy middle; the border stays."""
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    blurred = pixels.float()
    blurred[:, :, 1:-1, 1:-1] = F.conv2d(blurred, kernel / 13, groups=3).round()
    return blurred


def _posterized(pixels: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    bits = 8 - (6 * strength.abs()).round().int()
    return pixels & (255 << (8 - bits) & 255).to(torch.uint8)


def _solarized(pixels: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return torch.where(pixels >= 255 * (1 - strength.abs()), 255 - pixels, pixels)


MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLOURS = {
    "brightness": lambda x, strength: _blend(x, torch.zeros_like(x), strength),
    "color": lambda x, strength: _blend(x, _grey(x), strength),
    "contrast": lambda x, strength: _blend(x, _grey(x).mean((1, 2, 3), keepdim=True), strength),
    "sharpness": lambda x, strength: _blend(x, _blurred(x), strength),
    "posterize": _posterized,
    "solarize": _solarized,
    "autocontrast": lambda x, strength: tv.autocontrast(x),
    "equalize": lambda x, strength: tv.equalize(x),
}
OPERATIONS = (*MOVES, *COLOURS, "identity")

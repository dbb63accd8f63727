"""TrivialAugment over whole batches (arXiv 2103.10158, wide space): one operation and one strength for each image.

torchvision's version changes all images of a batch alike, or needs a loop over the images. Here, images with the same
operation are changed together, each with its own strength. The pixels equal torchvision's but for ties in rounding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

BINS = 31
"""Number of strengths of each operation, evenly spaced over [0, 1]."""
SHIFT, ROTATION, SHEAR, BLEND = 32.0, 135.0, 0.99, 0.99
"""Changes at strength 1: pixels, degrees, the tangent of the shear angle, and the blend factor's distance from 1."""
GRAY = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Draws:
    """The random operation of each image of a batch, on the CPU."""

    operation: torch.Tensor
    """int64 `[N]`: indices into `OPERATIONS`."""
    strength: torch.Tensor
    """float32 `[N]` in [-1, 1]; the sign is the direction, if the operation has one."""

    def __getitem__(self, index: torch.Tensor) -> "Draws":
        return Draws(self.operation[index], self.strength[index])


def draw(images: int, fraction: float, generator: torch.Generator) -> Draws:
    """Draw an operation for about `fraction` of the images; the others get the identity."""
    operation = torch.randint(len(OPERATIONS), (images,), generator=generator)
    strength = torch.randint(BINS, (images,), generator=generator) / (BINS - 1)
    sign = 2.0 * torch.randint(2, (images,), generator=generator) - 1
    chosen = torch.rand(images, generator=generator) < fraction
    return Draws(torch.where(chosen, operation, OPERATIONS.index("identity")), strength * sign)


def trivial_augment(pixels: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Apply the drawn operation to each image of `pixels`, uint8 `[N, C, S, S]` on any device."""
    out = pixels.clone()
    moved = (draws.operation < len(MOVES)).nonzero()[:, 0]
    if len(moved):
        theta = _affine(draws[moved], pixels.shape[-1])
        index, theta = (tensor.to(pixels.device, non_blocking=True) for tensor in (moved, theta))
        grid = F.affine_grid(theta, [len(moved), *pixels.shape[1:]], align_corners=False)
        images = pixels[index].float()
        out[index] = F.grid_sample(images, grid, "nearest", "zeros", align_corners=False).to(torch.uint8)
    for number, name in enumerate(OPERATIONS[len(MOVES) :], len(MOVES)):
        index = (draws.operation == number).nonzero()[:, 0]
        if name != "identity" and len(index):
            operands = (index, draws.strength[index].view(-1, 1, 1, 1))
            index, strength = (tensor.to(pixels.device, non_blocking=True) for tensor in operands)
            out[index] = COLORS[name](pixels[index], strength)
    return out


def _affine(draws: Draws, size: int) -> torch.Tensor:
    """float32 `[N, 2, 3]`: maps output to input coordinates from -1 to 1. Shears keep the upper left corner."""
    shear, shift = SHEAR * draws.strength, 2 * (SHIFT * draws.strength).trunc() / size
    angle = (ROTATION * draws.strength).deg2rad()
    theta = torch.eye(2, 3).repeat(len(shear), 1, 1)
    marked = {name: draws.operation == number for number, name in enumerate(MOVES)}
    theta[:, 0, 1:] += torch.where(marked["shear_x"], shear, 0)[:, None]
    theta[:, 1, 0::2] += torch.where(marked["shear_y"], shear, 0)[:, None]
    theta[:, 0, 2] -= torch.where(marked["translate_x"], shift, 0)
    theta[:, 1, 2] -= torch.where(marked["translate_y"], shift, 0)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    theta[marked["rotate"], :, :2] = rotation[marked["rotate"]]
    return theta


def _blend(pixels: torch.Tensor, other: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Move away from `other` by a factor of 1 + BLEND * strength; at -1 almost only `other` remains."""
    factor = 1 + BLEND * strength
    return (factor * pixels + (1 - factor) * other).clamp(0, 255).to(torch.uint8)


def _gray(pixels: torch.Tensor) -> torch.Tensor:
    if pixels.shape[1] == 1:
        return pixels.float()
    red, green, blue = (weight * pixels[:, [channel]] for channel, weight in enumerate(GRAY))
    return (red + green + blue).floor()


def _blur(pixels: torch.Tensor) -> torch.Tensor:
    """Apply a 3x3 kernel with weight 5 in the middle; border pixels stay."""
    kernel = torch.ones(pixels.shape[1], 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    blurred = pixels.float()
    blurred[:, :, 1:-1, 1:-1] = F.conv2d(blurred, kernel / 13, groups=pixels.shape[1]).round()
    return blurred


def _posterize(pixels: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    bits = 8 - (6 * strength.abs()).round().int()
    return pixels & (255 << (8 - bits) & 255).to(torch.uint8)


def _solarize(pixels: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return torch.where(pixels >= 255 * (1 - strength.abs()), 255 - pixels, pixels)


MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLORS = {
    "brightness": lambda x, strength: _blend(x, torch.zeros_like(x), strength),
    "color": lambda x, strength: x if x.shape[1] == 1 else _blend(x, _gray(x), strength),
    "contrast": lambda x, strength: _blend(x, _gray(x).mean((1, 2, 3), keepdim=True), strength),
    "sharpness": lambda x, strength: _blend(x, _blur(x), strength),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": lambda x, strength: tv.autocontrast(x),
    "equalize": lambda x, strength: tv.equalize(x),
}
OPERATIONS = (*MOVES, *COLORS, "identity")

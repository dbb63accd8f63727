"""Augmentation of whole batches on the device, with the same result in one process as in several.

All random numbers are drawn on the CPU for the whole batch, whichever of its images a process works on. Flip and crop
are one gather. TrivialAugment and random erasing are our own because the libraries' versions change one image at a
time, or all images alike; mixup and CutMix are timm's.
"""

import math

import numpy as np
import torch
from timm.data import Mixup
from torchvision.transforms.v2.functional import resized_crop

from stages.common.errors import UserError
from stages.networks.preprocess import Preprocess
from stages.params.finetune import Finetune
from stages.training.trivial_augment import draw, trivial_augment

ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
"""Ranges of an erased rectangle: fraction of the image's area, and height over width."""
CROP_ASPECT = (3 / 4, 4 / 3)
"""Range of height over width of a random resized crop."""


class Augmentation:
    """Turns a batch of stored images into the network's input, as the recipe says.

    Args:
        images: number of images in the training part.
        classes: number of logits.
        seed: seed of the flips.
    """

    def __init__(self, recipe: Finetune, images: int, classes: int, seed: int) -> None:
        self.recipe = recipe
        self.flip = AlternatingFlip(images, recipe.horizontal_flip, seed)
        self.mix = None
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)

    def __call__(
        self,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        preprocess: Preprocess,
        index: np.ndarray,
        positions: torch.Tensor,
        epoch: int,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            pixels: uint8 `[N, H, W, C]`: this process's part of the batch, with its labels int64 `[N]`.
            index: int64 `[B]`: the images of the whole batch, as numbers in the training part.
            positions: int64 `[N]`: the positions of this process's images in the batch.
            epoch: counted from 0.
            generator: on the CPU, in the same state in every process. timm's mixing uses NumPy's global one.

        Returns:
            Normalized images `[N, C, H, W]`, and labels int64 `[N]` or mixed `[N, classes]`.
        """
        recipe, batch = self.recipe, len(index)
        padding = 0 if recipe.random_resized_crop else recipe.crop_padding
        shifts = torch.randint(-padding, padding + 1, (2, batch, 1), generator=generator)
        pixels = flip_and_crop(pixels, self.flip(index, epoch)[positions], shifts[:, positions])
        if recipe.random_resized_crop:
            area = recipe.random_resized_crop, 1.0
            crops = draw_rectangles(batch, pixels.shape[1:3], area, CROP_ASPECT, generator)[positions]
            pixels = crop_and_resize(pixels, crops, preprocess.input_size)
        if recipe.trivial_augment:
            draws = draw(batch, recipe.trivial_augment, generator)[positions]
            pixels = trivial_augment(pixels.permute(0, 3, 1, 2), draws).permute(0, 2, 3, 1)
        x = preprocess.normalize(pixels)
        if recipe.random_erasing:
            rectangles = draw_rectangles(batch, x.shape[2:], ERASED_AREA, ERASED_ASPECT, generator)
            rectangles[torch.rand(batch, generator=generator) >= recipe.random_erasing] = 0
            x = erase(x, rectangles[positions].to(x.device, non_blocking=True))
        if self.mix is not None and len(x) % 2 == 0:
            x, labels = self.mix(x, labels)
        return x, labels


def positions_of(batch_size: int, rank: int, world_size: int) -> torch.Tensor:
    """int64 `[batch_size / world_size]`: the positions in a batch of the images that a process works on.

    Mixing pairs the first image with the last, the second with the last but one, and so on: a process gets whole pairs,
    in this order.

    Raises:
        UserError: if the pairs do not divide evenly.
    """
    if world_size > 1 and batch_size % (2 * world_size):
        raise UserError(
            f"finetune.batch_size: {batch_size} images do not divide evenly over {world_size} processes: use a multiple"
            f" of {2 * world_size} (mixing needs whole pairs of images)"
        )
    position = torch.arange(batch_size)
    return position[torch.minimum(position, batch_size - 1 - position) % world_size == rank]


def flip_and_crop(pixels: torch.Tensor, flips: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Mirror the images that `flips` marks and shift every image, with reflection at the border.

    Args:
        pixels: uint8 `[N, H, W, C]`.
        flips: bool `[N]`.
        shifts: int64 `[2, N, 1]` in pixels: down and to the right.
    """
    n, height, width, channels = pixels.shape
    flips, shifts = (tensor.to(pixels.device, non_blocking=True) for tensor in (flips, shifts))
    image, row, column = (torch.arange(size, device=pixels.device) for size in (n, height, width))
    rows, columns = _reflect(row + shifts[0], height), _reflect(column + shifts[1], width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    flat = (image[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
    return pixels.reshape(-1, channels).index_select(0, flat.flatten()).view(pixels.shape)


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Reflect an index beyond the border back into `[0, size)`, without repeating the border pixel."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index).clamp(0, size - 1)


def draw_rectangles(
    images: int,
    size: torch.Size | tuple[int, int],
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator,
) -> torch.Tensor:
    """A random rectangle in each image: top, left, bottom, right, int64 `[images, 4]`.

    Args:
        area: range of the fraction of the image's area, drawn uniformly.
        aspect: range of height over width, drawn log-uniformly.
    """
    height, width = size

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(images, generator=generator)

    areas = height * width * uniform(*area)
    aspects = uniform(*(math.log(limit) for limit in aspect)).exp()
    tall = (areas * aspects).sqrt().round().clamp(1, height)
    wide = (areas / aspects).sqrt().round().clamp(1, width)
    top = (uniform(0, 1) * (height - tall + 1)).floor()
    left = (uniform(0, 1) * (width - wide + 1)).floor()
    return torch.stack([top, left, top + tall, left + wide], 1).long()


def crop_and_resize(pixels: torch.Tensor, rectangles: torch.Tensor, size: int) -> torch.Tensor:
    """Cut `rectangles` (int64 `[N, 4]`) out of images uint8 `[N, H, W, C]` and scale each to `[size, size, C]`."""
    images = pixels.permute(0, 3, 1, 2)
    scaled = [
        resized_crop(image, top, left, bottom - top, right - left, [size, size], antialias=True)
        for image, (top, left, bottom, right) in zip(images, rectangles.tolist(), strict=True)
    ]
    return torch.stack(scaled).permute(0, 2, 3, 1)


def erase(x: torch.Tensor, rectangles: torch.Tensor) -> torch.Tensor:
    """Set `rectangles` (int64 `[N, 4]`) of normalized images `[N, C, H, W]` to 0, the mean of the data."""
    top, left, bottom, right = rectangles.t()[:, :, None, None]
    row = torch.arange(x.shape[2], device=x.device).view(1, -1, 1)
    column = torch.arange(x.shape[3], device=x.device).view(1, 1, -1)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return x.masked_fill(inside[:, None], 0)


class AlternatingFlip:
    """Mirrors a random half of the images in the first epoch, the other half in the next, and so on.

    Two epochs show every image both ways; independent draws for each epoch would repeat half of them.
    """

    def __init__(self, images: int, enabled: bool, seed: int) -> None:
        self.enabled = enabled
        self.first = torch.rand(images, generator=torch.Generator().manual_seed(seed)) < 0.5

    def __call__(self, index: np.ndarray, epoch: int) -> torch.Tensor:
        """bool `[N]`: which of the images at `index` (int64 `[N]`) to mirror."""
        flips = self.first[torch.from_numpy(index)]
        return flips.logical_xor(torch.tensor(bool(epoch % 2))) if self.enabled else torch.zeros_like(flips)

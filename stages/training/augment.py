"""Augmentation of whole batches on the device, the same in one process as shared out over several.

What is random is drawn on the CPU for the whole batch, whichever of its images a process works on. Flip and crop are
one gather, TrivialAugment and erasing are ours, as the libraries' change one image at a time or all alike; mixup and
cutmix are timm's.
"""

import math

import numpy as np
import torch
from timm.data import Mixup

from stages.common.errors import UserError
from stages.networks.preprocess import Preprocess
from stages.params.finetune import Finetune
from stages.training.trivial_augment import draw, trivial_augment

ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
"""Of a rectangle to erase: share of the image, height over width."""


class Augmentation:
    """From a batch of stored images to what the network sees, by the recipe's settings.

    Args:
        images: in the training part.
        classes: of the network's output.
        seed: of the order of flips.
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
        *,
        index: np.ndarray,
        share: torch.Tensor,
        epoch: int,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            pixels: uint8 `[N, H, W, 3]`: the share of this process in the batch, with its labels int64 `[N]`.
            preprocess: for normalisation.
            index: int64 `[B]`: the whole batch's images in the training part.
            share: int64 `[N]`: which of the batch these are.
            epoch: counted from 0.
            generator: on the CPU, in the same state in every process; timm's mixing draws from NumPy's global one.

        Returns:
            Images `[N, 3, H, W]`, normalised; labels int64 `[N]` as they are, or mixed to `[N, classes]`.
        """
        recipe, batch = self.recipe, len(index)
        shifts = torch.randint(-recipe.crop_padding, recipe.crop_padding + 1, (2, batch, 1), generator=generator)
        pixels = flip_and_crop(pixels, self.flip(index, epoch)[share], shifts[:, share])
        if recipe.trivial_augment:
            draws = draw(batch, recipe.trivial_augment, generator)[share]
            pixels = trivial_augment(pixels.permute(0, 3, 1, 2), draws).permute(0, 2, 3, 1)
        x = preprocess.normalise(pixels)
        if recipe.random_erasing:
            rectangles = draw_rectangles(batch, x.shape[2:], recipe.random_erasing, generator)
            x = erase(x, rectangles[share].to(x.device, non_blocking=True))
        if self.mix is not None and len(x) % 2 == 0:
            x, labels = self.mix(x, labels)
        return x, labels


def share_of(batch: int, rank: int, processes: int) -> torch.Tensor:
    """int64 `[batch / processes]`: the images of a batch that a process works on.

    Mixing pairs the first image with the last, the second with the last but one, and so on: pairs stay together, and in
    this order.

    Raises:
        UserError: if the pairs cannot be shared out evenly.
    """
    if processes > 1 and batch % (2 * processes):
        raise UserError(
            f"finetune.batch_size: {batch} images are not to be shared out evenly over {processes} processes: make it a"
            f" multiple of {2 * processes} (images are shared out by pairs, as mixing needs them)"
        )
    position = torch.arange(batch)
    return position[torch.minimum(position, batch - 1 - position) % processes == rank]


def flip_and_crop(pixels: torch.Tensor, flips: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Mirror the images that `flips` marks and shift each, reflecting at the border.

    Args:
        pixels: uint8 `[N, H, W, 3]`.
        flips: bool `[N]`.
        shifts: int64 `[2, N, 1]` in pixels: down and to the right.
    """
    n, height, width, _ = pixels.shape
    flips, shifts = (tensor.to(pixels.device, non_blocking=True) for tensor in (flips, shifts))
    first, row, column = (torch.arange(size, device=pixels.device) for size in (n, height, width))
    rows = _reflected(row + shifts[0], height)
    columns = _reflected(column + shifts[1], width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    flat = (first[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
    return pixels.reshape(-1, 3).index_select(0, flat.flatten()).view(n, height, width, 3)


def _reflected(index: torch.Tensor, size: int) -> torch.Tensor:
    """Fold an index that runs over the border back into `[0, size)`, without repeating the border pixel."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index).clamp(0, size - 1)


def draw_rectangles(
    images: int, size: torch.Size | tuple[int, int], probability: float, generator: torch.Generator
) -> torch.Tensor:
    """A rectangle in each image, empty where nothing is to be erased: top, left, bottom, right, int64 `[images, 4]`."""
    height, width = size

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(images, generator=generator)

    area = height * width * uniform(*ERASED_AREA)
    aspect = uniform(*(math.log(limit) for limit in ERASED_ASPECT)).exp()
    tall = (area * aspect).sqrt().round().clamp(1, height)
    wide = (area / aspect).sqrt().round().clamp(1, width)
    top = (uniform(0, 1) * (height - tall + 1)).floor()
    left = (uniform(0, 1) * (width - wide + 1)).floor()
    tall = tall * (uniform(0, 1) < probability)
    return torch.stack([top, left, top + tall, left + wide], 1).long()


def erase(x: torch.Tensor, rectangles: torch.Tensor) -> torch.Tensor:
    """Set `rectangles` (int64 `[N, 4]`, as drawn) of the normalised images `[N, 3, H, W]` to the data's mean: zero."""
    top, left, bottom, right = rectangles.t()[:, :, None, None]
    row = torch.arange(x.shape[2], device=x.device).view(1, -1, 1)
    column = torch.arange(x.shape[3], device=x.device).view(1, 1, -1)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return x.masked_fill(inside[:, None], 0)


class AlternatingFlip:
    """Which images to mirror: a random half in the first epoch, the other half in the next, and so on.

    Every image is seen both ways within two epochs, where a coin for each epoch repeats half of them.
    """

    def __init__(self, images: int, enabled: bool, seed: int) -> None:
        self.enabled = enabled
        self.first = torch.rand(images, generator=torch.Generator().manual_seed(seed)) < 0.5

    def __call__(self, index: np.ndarray, epoch: int) -> torch.Tensor:
        """bool `[N]` for the images at `index` int64 `[N]`."""
        flips = self.first[torch.from_numpy(index)]
        return flips.logical_xor(torch.tensor(bool(epoch % 2))) if self.enabled else torch.zeros_like(flips)

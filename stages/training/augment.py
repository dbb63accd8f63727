"""Augmentation of whole batches on the device: flip and crop by one gather, mixup, cutmix and erasing from timm."""

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from stages.common.params import Finetune


def flip_and_crop(pixels: torch.Tensor, flips: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """Mirror the images that `flips` marks and shift each by up to `padding` pixels, reflecting at the border.

    Args:
        pixels: uint8 `[N, H, W, 3]`.
        flips: bool `[N]`.
        generator: on the CPU; draws one shift for each image and axis.
    """
    n, height, width, _ = pixels.shape
    if padding:
        shifts = torch.randint(-padding, padding + 1, (2, n, 1), generator=generator)
        rows = _reflected(torch.arange(height) + shifts[0], height)
        columns = _reflected(torch.arange(width) + shifts[1], width)
    else:
        rows, columns = torch.arange(height).expand(n, -1), torch.arange(width).expand(n, -1)
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    flat = (torch.arange(n)[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
    return pixels.reshape(-1, 3).index_select(0, flat.flatten().to(pixels.device)).view(n, height, width, 3)


def _reflected(index: torch.Tensor, size: int) -> torch.Tensor:
    """Fold an index that runs over the border back into `[0, size)`, without repeating the border pixel."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index).clamp(0, size - 1)


class BatchMixing:
    """Mixup, cutmix and random erasing as timm does them, for the recipe's settings.

    timm draws from Python's, NumPy's and torch's global generators: the loop seeds them for each epoch.
    """

    def __init__(self, recipe: Finetune, classes: int, device: torch.device) -> None:
        self.mix = None
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
        self.erase = None
        if recipe.random_erasing:
            self.erase = RandomErasing(recipe.random_erasing, mode="pixel", max_count=1, device=device)

    def __call__(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` `[N, 3, H, W]` normalised; labels int64 `[N]` come back as they are, or mixed to `[N, classes]`."""
        if self.erase is not None:
            x = self.erase(x)
        if self.mix is not None and len(x) % 2 == 0:
            x, labels = self.mix(x, labels)
        return x, labels


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

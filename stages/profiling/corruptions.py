"""Seeded corruptions of images, as cameras, light and storage cause them.

They are five corruptions of Hendrycks & Dietterich (arXiv 1903.12261), each at levels 1, 3 and 5 of CIFAR-10-C:
Gaussian noise and blur, brightness, contrast and JPEG. Their strengths are for images of 32 pixels; the blur's standard
deviation grows with the image.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

TOGETHER = 64
"""Images that are held as floats at the same time."""


@dataclass(frozen=True)
class Cell:
    """One corruption at one severity."""

    corruption: str
    severity: int
    """1, 2 or 3."""
    images: np.ndarray
    """uint8 `[N, S, S, C]`."""


def sample(n: int, count: int, seed: int) -> np.ndarray:
    """Draw the images to corrupt: sorted positions int64 `[min(count, n)]` among `n` images, regardless of class."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:count])


def cells(images: np.ndarray, seed: int) -> Iterator[Cell]:
    """Every corruption at every severity of uint8 images `[N, S, S, C]`; the same seed gives the same pixels."""
    for number, (name, (corrupt, strengths)) in enumerate(CORRUPTIONS.items()):
        for severity, strength in enumerate(strengths, 1):
            generator = np.random.default_rng([seed, number, severity])
            found = np.empty_like(images)
            for start in range(0, len(images), TOGETHER):
                some = slice(start, start + TOGETHER)
                corrupted = corrupt(np.asarray(images[some], np.float32) / 255, strength, generator)
                found[some] = np.rint(np.clip(corrupted, 0, 1) * 255).astype(np.uint8)
            yield Cell(name, severity, found)


def _noise(pixels: np.ndarray, std: float, generator: np.random.Generator) -> np.ndarray:
    return pixels + np.float32(std) * generator.standard_normal(pixels.shape, np.float32)


def _blur(pixels: np.ndarray, std: float, _: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    std *= pixels.shape[1] / 32
    return gaussian_filter(pixels, (0, std, std, 0), mode="nearest")


def _brightness(pixels: np.ndarray, added: float, _: np.random.Generator) -> np.ndarray:
    """Add to the value of hue, saturation and value, which scales red, green and blue; black becomes gray."""
    value = pixels.max(-1, keepdims=True)
    brighter = np.minimum(value + np.float32(added), 1)
    return np.where(value > 0, pixels * (brighter / np.maximum(value, 1e-6)), brighter)


def _contrast(pixels: np.ndarray, kept: float, _: np.random.Generator) -> np.ndarray:
    """Move each pixel towards the mean of its image and channel."""
    means = pixels.mean((1, 2), keepdims=True)
    return means + (pixels - means) * np.float32(kept)


def _jpeg(pixels: np.ndarray, quality: float, _: np.random.Generator) -> np.ndarray:
    stored = np.empty_like(pixels)
    for place, image in enumerate(np.rint(pixels * 255).astype(np.uint8)):
        file = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "JPEG", quality=int(quality))
        stored[place] = np.asarray(Image.open(file), np.float32).reshape(image.shape) / 255
    return stored


CORRUPTIONS: dict[str, tuple[Callable[[np.ndarray, float, np.random.Generator], np.ndarray], tuple[float, ...]]] = {
    "noise": (_noise, (0.04, 0.08, 0.10)),
    "blur": (_blur, (0.4, 0.7, 1.0)),
    "brightness": (_brightness, (0.05, 0.15, 0.30)),
    "contrast": (_contrast, (0.75, 0.40, 0.15)),
    "JPEG": (_jpeg, (80, 58, 40)),
}
"""Function and strengths: std for pixels in [0, 1]; std in pixels of 32; added value; remaining contrast; quality."""

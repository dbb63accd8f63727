"""The images on disk, as every stage after download reads them: one pair of `.npy` files for each part.

`<part>_images.npy` is uint8 `[N, H, W, 3]`, `<part>_labels.npy` int64 `[N]`; `images.json` describes them. Arrays are
memory-mapped, so data sets larger than memory work.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stages.common.errors import UserError
from stages.common.files import read_json

INFO = "images.json"
PARTS = ("train", "validation", "test")
PartName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Part:
    """One part of the data: `images` uint8 `[N, H, W, 3]` (memory-mapped, read only), `labels` int64 `[N]`.

    They stand in the order of their source, which may be sorted by class: draw a sample, never take the first ones.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def spread(self, count: int) -> np.ndarray:
        """uint8 `[min(count, N), H, W, 3]`: images from all over the part, the same each time."""
        return np.array(self.images[np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(np.int64)])


@dataclass(frozen=True)
class Info:
    """`images.json`. `mean` and `std` are those of each channel over the train part, pixels scaled to [0, 1].

    A channel that never changes gets a `std` of 1, so that it can be normalised.
    """

    name: str
    source: str
    """In words, for reports: "JPEG CIFAR-10 (parquet)" must not pass for the lossless original."""
    licence: str
    image_size: int
    classes: list[str]
    counts: dict[str, int]
    """Images in each part."""
    mean: list[float]
    std: list[float]
    files: dict[str, str]
    """sha256 of each array file."""
    sha256: str
    """Of all arrays together (what `sha256sum *.npy | sha256sum` prints): names the data in artifacts and reports."""
    unreadable: list[str]
    """Images that were left out under `data.allow_unreadable`."""

    def as_parent(self) -> dict[str, str]:
        return {"name": self.name, "sha256": self.sha256}


def read_info(folder: Path) -> Info:
    raw: Any = read_json(folder / INFO)
    try:
        return Info(**raw)
    except TypeError as error:
        raise UserError(f"{folder / INFO}: {error}: make it again with `dvc repro download`") from None


def open_part(folder: Path, part: PartName) -> Part:
    """Memory-map one part. Only what measures a chosen artifact (profile, the printed samples) may open `test`.

    Raises:
        UserError: if a file is missing, broken or does not have the shape that `images.json` tells.
    """
    info = read_info(folder)
    arrays = []
    for kind in ("images", "labels"):
        path = folder / f"{part}_{kind}.npy"
        try:
            arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: run `dvc repro download`") from None
        except ValueError as error:
            reason = str(error).partition(" If you trust")[0]  # which nobody should
            raise UserError(f"{path} is broken ({reason}): delete {folder} and run `dvc repro download`") from None
    images, labels = arrays
    expected = (info.counts[part], info.image_size, info.image_size, 3)
    if images.shape != expected or labels.shape != expected[:1]:
        raise UserError(f"{folder}: {part} has shapes {images.shape} and {labels.shape}, {INFO} tells {expected}")
    return Part(images, np.array(labels))

"""The images on disk, as every stage after download reads them: one pair of `.npy` files for each part.

`<part>_images.npy` is uint8 `[N, H, W, C]`, `<part>_labels.npy` int64 `[N]`; `images.json` describes them. Arrays are
memory-mapped, so data sets larger than memory work.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stages.common.errors import UserError
from stages.common.files import read_json
from stages.params.section import Geometry

INFO = "images.json"
PartName = Literal["train", "validation", "test"]
PARTS: tuple[PartName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Part:
    """One part of the data: `images` uint8 `[N, H, W, C]` (memory-mapped, read-only), `labels` int64 `[N]`.

    The order is that of the source, which may be sorted by class: a sample must never be the first images.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def spread(self, count: int) -> np.ndarray:
        """`count` evenly spaced images of the part (or all): uint8 `[min(count, N), H, W, C]`."""
        return np.array(self.images[np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(np.int64)])


@dataclass(frozen=True)
class Info:
    """The content of `images.json`.

    `mean` and `std` describe each channel of the train part, with pixels scaled to [0, 1]. The `std` of a constant
    channel is 1, so that it can be normalized.
    """

    name: str
    source: str
    """Description for reports. It includes the file format, since JPEG files differ from the lossless original."""
    licence: str
    image_size: int
    geometry: Geometry
    channels: int
    classes: list[str]
    counts: dict[str, int]
    """Images in each part."""
    mean: list[float]
    std: list[float]
    files: dict[str, str]
    """sha256 of each array file."""
    sha256: str
    """Checksum over all arrays, as `sha256sum *.npy | sha256sum` prints it. It identifies the data in artifacts."""
    unreadable: list[str]
    """Images that `data.allow_unreadable` left out."""
    class_counts: dict[str, list[int]] = field(default_factory=dict)
    """Images of each class in each part."""
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Images that a person should look at, by kind (`datasets.findings`): their `count` and some `examples`."""
    levels: list[float] | None = None
    """`data.levels`."""

    def as_parent(self) -> dict[str, str]:
        return {"name": self.name, "sha256": self.sha256}


def read_info(folder: Path) -> Info:
    raw: Any = read_json(folder / INFO)
    try:
        return Info(**raw)
    except TypeError as error:
        raise UserError(f"{folder / INFO}: {error}: make it again with `dvc repro download`") from None


def open_part(folder: Path, part: PartName) -> Part:
    """Memory-map one part. Only code that measures a finished artifact (profile, printed samples) may open `test`.

    Raises:
        UserError: if a file is missing or broken, or if its shape differs from `images.json`.
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
            reason = str(error).partition(" If you trust")[0]  # unpickling is never an option
            raise UserError(f"{path} is broken ({reason}): delete {folder} and run `dvc repro download`") from None
    images, labels = arrays
    expected = (info.counts[part], info.image_size, info.image_size, info.channels)
    if images.shape != expected or labels.shape != expected[:1]:
        raise UserError(f"{folder}: {part} has shapes {images.shape} and {labels.shape}, {INFO} says {expected}")
    return Part(images, np.array(labels))

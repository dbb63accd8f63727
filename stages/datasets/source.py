"""What every source gives to the writer: labels that are cheap to know, then the images one after another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages.datasets.store import PartName

PART_NAMES: dict[str, PartName] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""How data sets in the wild call the three parts, in folder and file names."""


class RawImage(NamedTuple):
    """One image as the source has it: encoded bytes, a file, or pixels (uint8 `[H, W]` or `[H, W, 3]`)."""

    name: str
    """Where a person finds it, for messages."""
    content: bytes | Path | np.ndarray | None
    """None where the source names an image but does not hold it."""


@dataclass(frozen=True)
class Source:
    description: str
    """In words, for reports; the writer adds the file formats that it meets."""
    licence: str
    classes: list[str]
    labels: dict[PartName, np.ndarray]
    """int64 `[N]` for each part that the source itself tells apart: always `train`, others where it has them."""
    images: Callable[[PartName], Iterator[RawImage]]
    """The images of a part, in the order of its labels."""
    remark: str = ""
    """What a person should know about how the source was read; ends the stage's summary."""

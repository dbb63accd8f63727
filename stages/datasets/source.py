"""The form in which every source gives its images: labels first, then one image after another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages.datasets.store import PartName

PART_NAMES: dict[str, PartName] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Common names of the three parts in folder and file names."""


class RawImage(NamedTuple):
    """One image as the source stores it: encoded bytes, a file, or pixels (uint8 `[H, W]` or `[H, W, 3]`)."""

    name: str
    """Where a person finds the image, for messages."""
    content: bytes | Path | np.ndarray | None
    """None if the source lists an image but does not contain it."""


@dataclass(frozen=True)
class Source:
    description: str
    """For reports; the writer adds the file formats."""
    licence: str
    classes: list[str]
    labels: dict[PartName, np.ndarray]
    """int64 `[N]` for each part that the source has: always `train`, sometimes others."""
    images: Callable[[PartName], Iterator[RawImage]]
    """The images of a part, in the order of its labels."""
    remark: str = ""
    """A note for the user, which ends the summary of the stage."""

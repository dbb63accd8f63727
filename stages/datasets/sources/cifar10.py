"""CIFAR-10 from the archive of its authors, or from Parquet files in Hugging Face's layout."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from stages.common.errors import UserError
from stages.datasets.obtain import obtain
from stages.datasets.source import RawImage, Source
from stages.datasets.sources.parquet import parquet_files, parquet_source
from stages.datasets.store import PartName

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LICENCE = "none stated; see https://www.cs.toronto.edu/~kriz/cifar.html"


def cifar10_source(location: str | None, sha256: dict[str, str], scratch: Path) -> Source:
    """The training and test part of CIFAR-10, 32x32 RGB.

    torchvision unpickles the batches of the archive. This is safe because it first compares the MD5 of each batch with
    the published one: MD5 allows collisions, but nobody can make another file with a given MD5.

    Args:
        location: the archive, the folder `cifar-10-batches-py` from it, a folder that holds one of them, or Parquet
            files. The archive is downloaded if this is None.

    Raises:
        UserError: as `obtain` and `parquet_source`; also for a missing or changed batch and for other classes.
    """
    if location and parquet_files(Path(location).expanduser()):
        source = parquet_source(location, sha256, scratch)
        if source.classes != CLASSES:
            raise UserError(f"{location} is not CIFAR-10: its classes are others; use `source: parquet`")
        return replace(source, description="CIFAR-10 (parquet)", licence=LICENCE)

    from torchvision.datasets import CIFAR10  # imports torch: seconds

    location, archive = location or CIFAR10.url, Path(CIFAR10.url).name
    if (inside := Path(location).expanduser() / archive).is_file():
        location = str(inside)
    folder = obtain(location, sha256, scratch, f"md5:{CIFAR10.tgz_md5}")
    root = folder.parent if folder.name == CIFAR10.base_folder else folder
    try:
        parts: dict[PartName, CIFAR10] = {"train": CIFAR10(root), "test": CIFAR10(root, train=False)}
    except RuntimeError:  # torchvision does not name the file
        raise UserError(
            f"{root / CIFAR10.base_folder}: a batch is missing or has a wrong checksum: data.location must be"
            f" {archive}, the folder {CIFAR10.base_folder} from it, or a folder of parquet files"
        ) from None

    def images(part: PartName) -> Iterator[RawImage]:
        return (RawImage(f"{part} image {index}", pixels) for index, pixels in enumerate(parts[part].data))

    return Source(
        description="CIFAR-10 (official archive, lossless)",
        licence=LICENCE,
        classes=parts["train"].classes,
        labels={part: np.array(data.targets, dtype=np.int64) for part, data in parts.items()},
        images=images,
    )

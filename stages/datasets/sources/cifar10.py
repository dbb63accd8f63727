"""CIFAR-10 as its authors publish it: address and checksums are torchvision's.

torchvision's own class is not used: it unpickles, it neither resumes nor keeps half a file from its final name. The
authors' batches are pickles, so they are read, after their checksum, by an unpickler that can build arrays and plain
values and nothing else: md5 alone would no longer be proof against a forged file.
"""

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.errors import UserError
from stages.datasets.checksums import Checksum
from stages.datasets.obtain import obtain
from stages.datasets.source import RawImage, Source
from stages.datasets.store import PartName


@dataclass(frozen=True)
class Release:
    """An archive in CIFAR's layout; each file goes with its md5."""

    url: str
    archive_md5: str
    folder: str
    train: list[tuple[str, str]]
    test: list[tuple[str, str]]
    meta: tuple[str, str]


def official_release() -> Release:
    from torchvision.datasets import CIFAR10

    return Release(
        url=CIFAR10.url,
        archive_md5=CIFAR10.tgz_md5,
        folder=CIFAR10.base_folder,
        train=[(name, md5) for name, md5 in CIFAR10.train_list],
        test=[(name, md5) for name, md5 in CIFAR10.test_list],
        meta=(CIFAR10.meta["filename"], CIFAR10.meta["md5"]),
    )


def cifar10_source(
    location: str | None, sha256: dict[str, str], scratch: Path, release: Release | None = None
) -> Source:
    """Train and test part of CIFAR-10, 32x32 RGB.

    Args:
        location: the archive or the folder unpacked from it (also the folder that holds either); None downloads it.
        release: another archive in the same layout than the official one.

    Raises:
        UserError: as `obtain`; also for a missing file and a wrong checksum of a batch.
    """
    release = release or official_release()
    archive = Path(release.url).name
    if location and (Path(location).expanduser() / archive).is_file():
        location = str(Path(location).expanduser() / archive)
    folder = obtain(location or release.url, sha256, scratch, Checksum("md5", release.archive_md5))
    if (folder / release.folder).is_dir():
        folder = folder / release.folder

    files: dict[PartName, list[str]] = {"train": [], "test": []}
    labels: dict[PartName, list[int]] = {"train": [], "test": []}
    parts: list[tuple[PartName, list[tuple[str, str]]]] = [("train", release.train), ("test", release.test)]
    for part, batches in parts:
        for name, md5 in batches:
            labels[part].extend(_entry(_checked(folder, name, md5), "labels"))
            files[part].append(name)

    def images(part: PartName) -> Iterator[RawImage]:
        for name in files[part]:
            pixels = _entry(folder / name, "data").reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            for index, image in enumerate(pixels):
                yield RawImage(f"{name}: image {index}", image)

    return Source(
        description="CIFAR-10 (official archive, lossless)",
        licence="none stated; see https://www.cs.toronto.edu/~kriz/cifar.html",
        classes=[str(name) for name in _entry(_checked(folder, *release.meta), "label_names")],
        labels={part: np.array(values, dtype=np.int64) for part, values in labels.items()},
        images=images,
    )


def _checked(folder: Path, name: str, md5: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing: data.location must be the CIFAR-10 python archive or what it unpacks to")
    Checksum("md5", md5).check(path)
    return path


def _entry(path: Path, key: str) -> Any:
    try:
        return load_plain(path.read_bytes())[key]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: no CIFAR batch ({type(error).__name__}: {error}): get the archive again") from None


def load_plain(content: bytes) -> Any:
    """Unpickle plain values and NumPy arrays.

    Raises:
        pickle.UnpicklingError: if the pickle names anything else, before that is imported or called.
    """
    return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()  # the batches are Python 2's


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return np.empty(0).__reduce__()[0]  # this NumPy's own, wherever that keeps it
            case ("numpy", "ndarray"):
                return np.ndarray
            case ("numpy", "dtype"):
                return np.dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch needs")

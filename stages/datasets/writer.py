"""Write a source in the layout of `store.py`, in one pass with a few images in memory at a time."""

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError

from stages.common.errors import UserError
from stages.common.files import sha256_of, write_json
from stages.datasets.copies import HASH_BYTES, SIDE, fingerprints, read_contents
from stages.datasets.decode import decode
from stages.datasets.findings import LOW_CONTRAST, exact_copies, near_copies_of, shortened
from stages.datasets.source import RawImage, Source
from stages.datasets.split import split
from stages.datasets.store import INFO, PARTS, Info, PartName
from stages.params.data import Data

CHUNK, GROUP = 64, 16  # images that are decoded at once, and by one thread
LEFT_OUT = -1  # in place of an index into PARTS
NO_FINGERPRINT = np.zeros(HASH_BYTES + SIDE**2, np.uint8)


class PartFile:
    """`<part>_images.npy` while it grows. It appends, because a memory map ends in a bus error on a full disk."""

    def __init__(self, path: Path, image_size: int, channels: int) -> None:
        self.path = path
        self.shape = image_size, image_size, channels
        self.labels: list[int] = []
        self.names: list[str] = []
        self.contents: list[bytes] = []
        self.fingerprints: list[np.ndarray] = []
        self.file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        # NumPy pads the header, so that a larger first dimension fits in the same space.
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.labels), *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, pixels: np.ndarray, label: int, name: str, content: bytes, seen: np.ndarray) -> None:
        self.file.write(pixels.tobytes())
        self.labels.append(label)
        self.names.append(name)
        self.contents.append(content)
        self.fingerprints.append(seen)

    def finish(self, labels_path: Path) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.close()
        np.save(labels_path, np.array(self.labels, dtype=np.int64))


def write_images(source: Source, data: Data, folder: Path, threads: int = 1) -> Info:
    """Decode, split and write all images of `source` into the empty folder `folder`, with `images.json`.

    Parts of the source stay as they are, but for training images whose file validation or test has too. A missing test
    part and then a missing validation part are cut from the training images, stratified by class, with identical files
    in one part. Images keep the order of the source. The same source and `data` give the same bytes for any number of
    threads.

    Raises:
        UserError: for an unreadable image (unless `data.allow_unreadable`), a class that is missing in a part, or a
            disk with too little room.
    """
    if len(source.classes) < 2:
        raise UserError(
            f"{data.location or data.name}: {len(source.classes)} class(es), a classifier needs two or more"
        )
    fractions: dict[PartName, float] = {"test": data.test_fraction, "validation": data.validation_fraction}
    cut = {part: fraction for part, fraction in fractions.items() if part not in source.labels}
    contents = {part: read_contents(source.images(part)) for part in source.labels}
    findings, left_out = exact_copies(contents, source.labels, source.classes)
    assignment = {part: np.full(len(labels), PARTS.index(part)) for part, labels in source.labels.items()}
    kept = np.flatnonzero(~left_out)
    hashes = [contents["train"][1][index] for index in kept]
    assignment["train"][:] = LEFT_OUT
    assignment["train"][kept] = split(source.labels["train"][kept], source.classes, cut, data.split_seed, hashes)
    _check_room(folder, sum(len(labels) for labels in source.labels.values()) * data.image_size**2 * data.channels)

    formats: set[str] = set()
    unreadable: list[str] = []
    files: dict[PartName, PartFile] = {
        part: PartFile(folder / f"{part}_images.npy", data.image_size, data.channels) for part in PARTS
    }
    try:
        with ThreadPoolExecutor(threads) as pool:
            for native, labels in source.labels.items():
                decoded = _decoded(source.images(native), data, pool)
                for part, label, content, (image, result) in zip(
                    assignment[native], labels, contents[native][1], decoded, strict=True
                ):
                    if part == LEFT_OUT:
                        continue
                    if isinstance(result, Exception):
                        if not data.allow_unreadable:
                            raise _unreadable(image, result, data.location or data.name) from result
                        unreadable.append(image.name)
                        continue
                    pixels, image_format, seen = result
                    if image_format:
                        formats.add(image_format)
                    files[PARTS[part]].append(pixels, int(label), image.name, content, seen)
                    if not seen.any():
                        findings["low_contrast"].append(image.name)
        for part, file in files.items():
            file.finish(folder / f"{part}_labels.npy")
    finally:
        for file in files.values():
            with suppress(OSError):  # closing writes what is left in the buffer: a full disk fails once more
                file.file.close()
    _check_filled(files, source.classes, ["train", *cut], len(unreadable), int(left_out.sum()))
    findings |= near_copies_of(
        {part: (file.names, file.contents) for part, file in files.items()},
        {part: np.array(file.fingerprints, np.uint8).reshape(-1, NO_FINGERPRINT.size) for part, file in files.items()},
    )

    arrays = {path.name: sha256_of(path) for path in sorted(folder.glob("*.npy"))}
    mean, std = mean_and_std(histogram_of(np.load(folder / "train_images.npy", mmap_mode="r")))
    info = Info(
        name=data.name,
        source=", ".join([source.description, *([f"{' and '.join(sorted(formats))} images"] if formats else [])]),
        licence=source.licence,
        image_size=data.image_size,
        geometry=data.geometry,
        channels=data.channels,
        classes=source.classes,
        counts={part: len(file.labels) for part, file in files.items()},
        class_counts={
            part: np.bincount(file.labels, minlength=len(source.classes)).tolist() for part, file in files.items()
        },
        mean=mean,
        std=std,
        files=arrays,
        sha256=hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in arrays.items()).encode()).hexdigest(),
        unreadable=unreadable,
        findings=shortened(findings),
        levels=data.levels,
    )
    write_json(folder / INFO, asdict(info))
    return info


def histogram_of(images: np.ndarray) -> np.ndarray:
    """How often each channel has each value: int64 `[C, 256]` of uint8 `[N, H, W, C]`."""
    counts = np.zeros((images.shape[3], 256), np.int64)
    for start in range(0, len(images), CHUNK):
        for channel, values in enumerate(np.moveaxis(images[start : start + CHUNK], 3, 0)):
            counts[channel] += np.bincount(values.ravel(), minlength=256)
    return counts


def mean_and_std(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and population std of each channel with pixels scaled to [0, 1], from its histogram (int64 `[C, 256]`).

    Integer counts make the result independent of the order of the images; six decimals make it independent of the
    machine.
    """
    values = np.arange(256) / 255
    mean = (histogram * values).sum(1) / histogram.sum(1)
    variance = (histogram * (values - mean[:, None]) ** 2).sum(1) / histogram.sum(1)
    std = np.where(variance > 0, np.sqrt(variance), 1.0)  # so that a constant channel can be normalized
    return [round(float(value), 6) for value in mean], [round(float(value), 6) for value in std]


def _decoded(
    images: Iterator[RawImage], data: Data, pool: ThreadPoolExecutor
) -> Iterator[tuple[RawImage, tuple[np.ndarray, str | None, np.ndarray] | Exception]]:
    while chunk := list(islice(images, CHUNK)):
        groups = [chunk[start : start + GROUP] for start in range(0, len(chunk), GROUP)]
        yield from zip(chunk, chain.from_iterable(pool.map(partial(_decode_group, data=data), groups)), strict=True)


def _decode_group(images: list[RawImage], data: Data) -> list[tuple[np.ndarray, str | None, np.ndarray] | Exception]:
    """Of each image its pixels, format and fingerprint (0 for an image without contrast), or the error."""
    decoded = [_try_decode(image, data) for image in images]
    if not (stack := [result[0] for result in decoded if not isinstance(result, Exception)]):
        return [result for result in decoded if isinstance(result, Exception)]
    pixels = np.stack(stack)
    seen = fingerprints(pixels)
    seen[pixels.reshape(len(pixels), -1).std(1) < LOW_CONTRAST] = 0  # it would be the fingerprint of noise
    of_image = iter(seen)
    return [result if isinstance(result, Exception) else (*result, next(of_image)) for result in decoded]


def _try_decode(image: RawImage, data: Data) -> tuple[np.ndarray, str | None] | Exception:
    if image.content is None:
        return ValueError("the source lists it but does not contain it")
    try:
        return decode(image.content, data.image_size, data.geometry, data.channels, data.levels)
    except MemoryError:
        raise
    except Exception as error:  # Pillow has no common class for broken files
        return error


def _unreadable(image: RawImage, error: Exception, where: str) -> UserError:
    # Pillow's message for an unknown format ends in a memory address.
    reason = "no image format that Pillow reads" if isinstance(error, UnidentifiedImageError) else error
    return UserError(
        f"{where}: {image.name}: unreadable image ({reason}): repair or remove it,"
        " or set `data.allow_unreadable: true` to leave out unreadable images and list them"
    )


def _check_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"the images need {needed_bytes / 1e6:,.0f} MB, {folder.parent} has {free_bytes / 1e6:,.0f} MB left:"
            " make room, or lower data.image_size"
        )


def _check_filled(
    files: dict[PartName, PartFile], classes: list[str], parts: list[PartName], lost: int, copies: int
) -> None:
    """Check that every class still has an image in `parts` after unreadable images and copies were left out."""
    for part in parts:
        counts = np.bincount(files[part].labels, minlength=len(classes))
        if empty := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
            raise UserError(
                f"class {empty[0]!r} has no image in {part} ({lost} unreadable ones and {copies} copies of held-out"
                " images were left out): repair some, add images, or change data.split_seed"
            )

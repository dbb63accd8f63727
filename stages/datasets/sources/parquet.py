"""Parquet files in the column layout of Hugging Face image data sets."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.common.errors import UserError
from stages.datasets.obtain import obtain
from stages.datasets.source import PART_NAMES, RawImage, Source
from stages.datasets.store import PARTS, PartName

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

ROWS = 64  # read at once


def parquet_source(location: str, sha256: dict[str, str], scratch: Path) -> Source:
    """Images from a Parquet file, a folder of them (or an archive of one), or the URL of either.

    Columns: `img` or `image`, a struct with `bytes` (an encoded image) and `path`; `label`, an integer. The class names
    come from the `huggingface` metadata; without it the numbers are the names. A file belongs to the part that its name
    begins with (`train-00000-of-00002.parquet`) or that its folder is named after, with the names in `PART_NAMES`;
    other files belong to train. A test or validation part may lack classes.

    Raises:
        UserError: as `obtain`; also for broken files, missing columns, labels outside the classes, and classes that
            differ between files.
    """
    path = obtain(location, sha256, scratch)
    root, paths = (path.parent, [path]) if path.is_file() else (path, parquet_files(path))
    if not paths:
        raise UserError(f"{path} holds no .parquet files: check data.location")
    homes = sorted({file.parent.name for file in paths})
    if len(homes) > 1 and not all(home in PART_NAMES for home in homes):
        raise UserError(f"{path} holds several data sets ({', '.join(homes)}): name one of them in data.location")
    files: dict[PartName, list[Path]] = {}
    for file in paths:
        files.setdefault(_part_of(file), []).append(file)
    if "train" not in files:
        raise UserError(f"{location}: there is no train part: its parquet files are named for {', '.join(files)}")
    files = {part: files[part] for part in PARTS if part in files}

    names, licence = _names_and_licence([file for group in files.values() for file in group])
    labels = {part: np.concatenate([_labels(file) for file in group]) for part, group in files.items()}
    highest = max(int(values.max(initial=-1)) for values in labels.values())
    classes = names or [str(label) for label in range(highest + 1)]
    for part, group in files.items():
        _check_labels(labels[part], len(classes), f"{location} ({part}: {', '.join(file.name for file in group)})")

    def images(part: PartName) -> Iterator[RawImage]:
        for file in files[part]:
            yield from _images(file, file.relative_to(root).as_posix())

    remark = _missing_classes(labels, classes)
    return Source(description="parquet", licence=licence, classes=classes, labels=labels, images=images, remark=remark)


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or those in the folder, or else those in its sub-folders; empty if there are none."""
    if path.suffix == ".parquet":
        return [path]
    return sorted(path.glob("*.parquet")) or sorted(path.glob("*/*.parquet"))


def _part_of(file: Path) -> PartName:
    begin = re.split("[-_.]", file.stem.lower())[0]
    return PART_NAMES.get(begin) or PART_NAMES.get(file.parent.name.lower()) or "train"


@contextmanager
def _reading(path: Path) -> Iterator["ParquetFile"]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        # Buffered reads without pre-buffering: a row group of photographs can be larger than memory.
        with ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{path}: broken parquet file ({first_line}): get it again") from None


def _names_and_licence(paths: list[Path]) -> tuple[list[str], str]:
    """The class names (empty without metadata) and the licence."""
    found: list[tuple[list[str], str]] = []
    for path in paths:
        with _reading(path) as file:
            _check_columns(file, path)
            metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        try:
            info: dict[str, Any] = json.loads(metadata).get("info", {})
            names = info.get("features", {}).get("label", {}).get("names") or []
            found.append(([str(name) for name in names], str(info.get("license") or "not stated")))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: its huggingface metadata cannot be read ({error}): write it anew") from None
        if found[-1][0] != found[0][0]:
            raise UserError(f"{path} names other classes than {paths[0]}: they are not parts of one data set")
    return found[0]


def _image_column(file: "ParquetFile") -> str | None:
    return next((name for name in ("img", "image") if name in file.schema_arrow.names), None)


def _check_columns(file: "ParquetFile", path: Path) -> None:
    from pyarrow import types

    schema, column = file.schema_arrow, _image_column(file)
    has_images = column is not None and types.is_struct(schema.field(column).type)
    has_images = has_images and "bytes" in {field.name for field in schema.field(column).type}
    if not has_images or "label" not in schema.names or not types.is_integer(schema.field("label").type):
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise UserError(
            f"{path}: needs columns `img` or `image` (a struct with bytes and path) and `label` (an integer);"
            f" it has {columns}"
        )


def _labels(path: Path) -> np.ndarray:
    with _reading(path) as file:
        column = file.read(columns=["label"]).column("label")
    if column.null_count:
        raise UserError(f"{path}: {column.null_count} rows have no label: leave them out of the file")
    return column.to_numpy().astype(np.int64)


def _check_labels(labels: np.ndarray, classes: int, where: str) -> None:
    if len(wrong := np.flatnonzero((labels < 0) | (labels >= classes))):
        raise UserError(
            f"{where}: row {wrong[0]} has label {labels[wrong[0]]}, the classes are 0 to {classes - 1}:"
            " correct the labels, or leave out an unlabeled part"
        )


def _images(path: Path, name: str) -> Iterator[RawImage]:
    with _reading(path) as file:
        column, row = _image_column(file), 0
        for batch in file.iter_batches(ROWS, columns=[column]):
            for image in batch.column(0).to_pylist():
                image = image or {}
                inner = image.get("path")
                yield RawImage(f"{name}: row {row}" + (f" ({inner})" if inner else ""), image.get("bytes"))
                row += 1


def _missing_classes(labels: dict[PartName, np.ndarray], classes: list[str]) -> str:
    lacking = [
        f"{part} lacks images of {len(missing)} of {len(classes)} classes, such as {classes[missing[0]]!r}"
        for part, values in labels.items()
        if len(missing := np.flatnonzero(np.bincount(values, minlength=len(classes)) == 0))
    ]
    return "; ".join(lacking)

"""One folder for each class, either at the top or inside a folder for each part."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stages.common.errors import UserError
from stages.datasets.obtain import obtain
from stages.datasets.source import PART_NAMES, RawImage, Source
from stages.datasets.store import PartName

SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
}


def folder_source(location: str, sha256: dict[str, str], scratch: Path) -> Source:
    """Images in `<class>/...` or `<part>/<class>/...`, in a folder, an archive of it, or the URL of an archive.

    Class folders are read recursively and sorted by name; `PART_NAMES` lists the names of parts. Hidden files are
    ignored. Files without the suffix of an image format are ignored and counted in the remark.

    Raises:
        UserError: as `obtain`; also for fewer than two class folders, a class without images, and parts whose classes
            differ.
    """
    root = obtain(location, sha256, scratch)
    if not root.is_dir():
        raise UserError(f"{root} is neither a folder nor a zip or tar archive")
    root = _descend(root)
    parts = _part_folders(root, location)
    classes = [folder.name for folder in _subfolders(parts["train"])]
    _require_classes(parts["train"], classes, location)
    files: dict[PartName, list[Path]] = {}
    labels: dict[PartName, np.ndarray] = {}
    ignored: list[Path] = []
    for part, folder in parts.items():
        _check_same_classes(folder, classes, parts["train"])
        files[part], owners = [], []
        for label, name in enumerate(classes):
            found, others = _class_files(folder / name)
            ignored += others
            if not found:
                seen = f"; {len(others)} other files, such as {others[0].name}" if others else ""
                raise UserError(
                    f"{location}: class {str((folder / name).relative_to(root))!r} holds no images{seen}:"
                    " add images (PNG, JPEG, ...) or remove the folder"
                )
            files[part] += found
            owners += [label] * len(found)
        labels[part] = np.array(owners, dtype=np.int64)

    def images(part: PartName) -> Iterator[RawImage]:
        return (RawImage(path.relative_to(root).as_posix(), path) for path in files[part])

    return Source(
        description="folder",
        licence="not stated",
        classes=classes,
        labels=labels,
        images=images,
        remark=f"files ignored because they are no images: {len(ignored):,}" if ignored else "",
    )


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.iterdir() if not _hidden(path.name))


def _descend(root: Path) -> Path:
    """The folder that holds the classes or parts: many archives wrap it in another folder."""
    while len(inner := _subfolders(root)) == 1 and not _is_part(inner[0]) and _subfolders(inner[0]):
        root = inner[0]
    return root


def _is_part(folder: Path) -> bool:
    """A part has the name of a part and holds only folders: a class of vehicles may be called `train` too."""
    return folder.name.lower() in PART_NAMES and bool(_subfolders(folder)) and not _holds_images(folder)


def _part_folders(root: Path, location: str) -> dict[PartName, Path]:
    inner = _subfolders(root)
    if not any(_is_part(folder) for folder in inner):
        return {"train": root}
    parts: dict[PartName, Path] = {}
    for folder in inner:
        part = PART_NAMES.get(folder.name.lower())
        if part is None:
            raise UserError(f"{location}: {folder.name!r} lies beside the parts but is none: remove or rename it")
        if part in parts:
            raise UserError(f"{location}: {folder.name!r} and {parts[part].name!r} are both the {part} part: keep one")
        parts[part] = folder
    if "train" not in parts:
        raise UserError(f"{location}: there is no train part beside {', '.join(parts)}: add a folder `train`")
    return parts


def _require_classes(train: Path, classes: list[str], location: str) -> None:
    if len(classes) < 2:
        found = f"one, {classes[0]!r}" if classes else "none"
        loose = sum(path.suffix.lower() in SUFFIXES for path in train.iterdir() if not _hidden(path.name))
        raise UserError(
            f"{location}: one sub-folder for each class is expected, two or more; {train} holds {found}"
            + (f", and {loose:,} image{'s' * (loose != 1)} outside: sort them into such folders" if loose else "")
        )


def _check_same_classes(folder: Path, classes: list[str], train: Path) -> None:
    found = {inner.name for inner in _subfolders(folder)}
    for names, missing_in, present_in in [
        (sorted(found - set(classes)), train, folder),
        (sorted(set(classes) - found), folder, train),
    ]:
        if names:
            raise UserError(
                f"class {names[0]!r} is in {present_in} but not in {missing_in}: every part needs the same classes"
            )


def _class_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images and other files, each sorted by path."""
    images: list[Path] = []
    others: list[Path] = []
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not _hidden(name)]
        for name in names:
            if not _hidden(name):
                path = Path(place, name)
                (images if path.suffix.lower() in SUFFIXES else others).append(path)
    return sorted(images), sorted(others)

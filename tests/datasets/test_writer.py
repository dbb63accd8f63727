import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.common.errors import UserError
from stages.datasets import writer
from stages.datasets.source import RawImage, Source
from stages.datasets.store import PARTS, open_part, read_info
from stages.datasets.writer import PartFile, mean_and_std, write_images
from stages.params.data import Data

DATA = Data(name="toy", source="digits", image_size=4, validation_fraction=0.2)
LENIENT = DATA.model_copy(update={"allow_unreadable": True})
PIXELS = np.random.default_rng(0).integers(0, 256, (100, 4, 4, 3), dtype=np.uint8)
LABELS = np.arange(100) % 2


def toy(broken: tuple[int, ...] = (), **labels: np.ndarray) -> Source:
    labels = {"train": LABELS} | labels

    def images(part: str) -> Iterator[RawImage]:
        for index in range(len(labels[part])):
            pixels = PIXELS[index] if part == "train" else 255 - PIXELS[index] // PARTS.index(part)
            yield RawImage(f"{part} {index}", b"no image %d" % index if index in broken else pixels)

    return Source("toy images", "none", ["even", "odd"], labels, images)


def written(tmp_path: Path, source: Source, data: Data = DATA, threads: int = 1) -> Path:
    tmp_path.mkdir(exist_ok=True)
    write_images(source, data, tmp_path, threads)
    return tmp_path


def found_in(folder: Path) -> dict[bytes, int]:
    parts = [open_part(folder, part) for part in PARTS]
    assert all((part.images.dtype, part.labels.dtype) == (np.uint8, np.int64) for part in parts)
    return {image.tobytes(): label for part in parts for image, label in zip(part.images, part.labels, strict=True)}


def test_every_image_is_in_exactly_one_part_with_its_label(tmp_path: Path) -> None:
    folder = written(tmp_path, toy())

    assert found_in(folder) == {image.tobytes(): label for image, label in zip(PIXELS, LABELS, strict=True)}
    assert read_info(folder).counts == {"train": 64, "validation": 16, "test": 20}


def test_parts_of_the_source_stay_whole_and_in_order_and_missing_ones_are_cut(tmp_path: Path) -> None:
    folder = written(tmp_path / "all", toy(validation=LABELS[:7], test=LABELS[:9]))

    assert read_info(folder).counts == {"train": 100, "validation": 7, "test": 9}
    np.testing.assert_array_equal(open_part(folder, "train").images, PIXELS)
    np.testing.assert_array_equal(open_part(folder, "test").images, 255 - PIXELS[:9] // 2)

    folder = written(tmp_path / "test", toy(test=LABELS[:9]))
    assert read_info(folder).counts == {"train": 80, "validation": 20, "test": 9}


def test_the_bytes_depend_on_the_seed_and_not_on_the_number_of_threads(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a", toy()), written(tmp_path / "b", toy(), threads=3)
    other = written(tmp_path / "c", toy(), DATA.model_copy(update={"split_seed": 1}))

    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert len(names) == 7
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert read_info(other).sha256 != read_info(first).sha256


def test_mean_and_std_are_numpys_over_the_train_part(tmp_path: Path) -> None:
    folder = written(tmp_path, toy())
    info, train = read_info(folder), open_part(folder, "train").images / 255

    np.testing.assert_allclose(info.mean, train.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(info.std, train.std((0, 1, 2)), atol=1e-6)
    constant = np.zeros((3, 256), dtype=np.int64)
    constant[:, 51] = 9
    assert mean_and_std(constant) == ([0.2] * 3, [1.0] * 3)


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    info = read_info(written(tmp_path, toy()))

    assert set(info.files) == {f"{part}_{kind}.npy" for part in PARTS for kind in ("images", "labels")}
    for name, digest in info.files.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    printed = subprocess.run("sha256sum *.npy | sha256sum", shell=True, cwd=tmp_path, capture_output=True, check=True)
    assert printed.stdout.decode().split()[0] == info.sha256


@pytest.mark.parametrize(
    ("source", "data", "message"),
    [
        (toy(broken=(41,)), DATA, r"train 41: unreadable image \(no image format.*data.allow_unreadable: true"),
        (
            replace(toy(), images=lambda part: (RawImage(f"row {index}", None) for index in range(100))),
            DATA,
            r"row 0: unreadable image .*does not contain it",
        ),
        (
            toy(broken=tuple(range(1, 100, 2))),
            LENIENT,
            r"class 'odd' has no image in train \(50 unreadable ones and 0 copies",
        ),
        (replace(toy(), classes=["even"]), DATA, r"1 class.*two or more"),
    ],
    ids=["unreadable", "without content", "class unreadable", "one class"],
)
def test_images_that_cannot_be_used_are_refused_by_name(source, data, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_images(source, data, tmp_path)


def test_allowed_unreadable_images_are_listed_and_leave_no_holes(tmp_path: Path) -> None:
    folder = written(tmp_path, toy(broken=(3, 41)), LENIENT)

    info = read_info(folder)
    assert info.unreadable == ["train 3", "train 41"]
    assert sum(info.counts.values()) == 98
    assert set(found_in(folder)) == {PIXELS[index].tobytes() for index in range(100) if index not in (3, 41)}


def test_geometry_and_channels_are_those_of_the_params_and_are_recorded(tmp_path: Path) -> None:
    data = DATA.model_copy(update={"geometry": "letterbox", "channels": 1, "image_size": 6})
    folder = written(tmp_path, toy(), data)
    info, part = read_info(folder), open_part(folder, "train")
    assert (info.geometry, info.channels, part.images.shape[1:]) == ("letterbox", 1, (6, 6, 1))
    assert info.mean == pytest.approx([part.images.mean() / 255], abs=1e-6)
    assert info.std == pytest.approx([part.images.std() / 255], abs=1e-6)


@pytest.mark.parametrize("length", [0, 9, 10, 101])
def test_a_growing_file_is_a_valid_array_at_any_length(length: int, tmp_path: Path) -> None:
    file = PartFile(tmp_path / "images.npy", 4, 3)
    for index in range(length):
        file.append(PIXELS[index % 100], 0, "image", b"", np.zeros(97, np.uint8))
    file.finish(tmp_path / "labels.npy")

    assert np.load(tmp_path / "images.npy", mmap_mode="r").shape == (length, 4, 4, 3)


def test_a_disk_with_too_little_room_is_noticed_before_any_work(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))

    with pytest.raises(UserError, match=r"need 0 MB, .* has 0 MB left: make room"):
        write_images(toy(), DATA, tmp_path)
    assert not list(tmp_path.iterdir())


def test_images_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def images(part: str) -> Iterator[RawImage]:
        nonlocal alive, most
        for index in range(1000):
            alive += 1
            most = max(most, alive)
            yield RawImage("image", (PIXELS[index % 100] ^ np.uint8(index // 100)).view(Counted))

    write_images(replace(toy(train=np.arange(1000) % 2), images=images), DATA, tmp_path)

    assert most < 400

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.common.errors import UserError
from stages.datasets import writer
from stages.datasets.sources import RawImage, Source
from stages.datasets.store import PARTS, open_part, read_info
from stages.datasets.writer import PartFile, mean_and_std, write_images
from stages.params.data import Data

DATA = Data(name="toy", source="digits", image_size=4, validation_fraction=0.2)
PIXELS = np.random.default_rng(0).integers(0, 256, (100, 4, 4, 3), dtype=np.uint8)
LABELS = np.arange(100) % 2


def toy(broken: tuple[int, ...] = (), labels: dict | None = None) -> Source:
    labels = labels or {"train": LABELS}

    def images(part: str) -> Iterator[RawImage]:
        for index in range(len(labels[part])):
            yield RawImage(f"{part} {index}", b"no image" if index in broken else PIXELS[index])

    return Source("toy images", "none", ["even", "odd"], labels, images)


def written(tmp_path: Path, source: Source, data: Data = DATA, threads: int = 1) -> Path:
    tmp_path.mkdir(exist_ok=True)
    write_images(source, data, tmp_path, threads)
    return tmp_path


def test_every_image_lands_in_exactly_one_part_with_its_label(tmp_path: Path) -> None:
    folder = written(tmp_path, toy())

    found = {}
    for part in PARTS:
        images, labels = open_part(folder, part).images, open_part(folder, part).labels
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        found |= {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert found == {image.tobytes(): label for image, label in zip(PIXELS, LABELS, strict=True)}
    assert read_info(folder).counts == {"train": 64, "validation": 16, "test": 20}


def test_parts_that_the_source_brings_stay_whole_and_in_order(tmp_path: Path) -> None:
    folder = written(tmp_path, toy(labels={"train": LABELS, "validation": LABELS[:7], "test": LABELS[:9]}))

    assert read_info(folder).counts == {"train": 100, "validation": 7, "test": 9}
    np.testing.assert_array_equal(open_part(folder, "train").images, PIXELS)
    np.testing.assert_array_equal(open_part(folder, "test").images, PIXELS[:9])


def test_a_native_test_part_leaves_only_validation_to_cut(tmp_path: Path) -> None:
    folder = written(tmp_path, toy(labels={"train": LABELS, "test": LABELS[:9]}))

    assert read_info(folder).counts == {"train": 80, "validation": 20, "test": 9}


def test_the_same_params_give_the_same_bytes_with_any_number_of_threads(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a", toy()), written(tmp_path / "b", toy(), threads=3)

    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert len(names) == 7
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_mean_and_deviation_are_numpys_over_the_train_part(tmp_path: Path) -> None:
    folder = written(tmp_path, toy())
    info, train = read_info(folder), open_part(folder, "train").images / 255

    np.testing.assert_allclose(info.mean, train.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(info.std, train.std((0, 1, 2)), atol=1e-6)


def test_a_constant_channel_can_still_be_normalised() -> None:
    histogram = np.zeros((3, 256), dtype=np.int64)
    histogram[:, 51] = 9

    assert mean_and_std(histogram) == ([0.2] * 3, [1.0] * 3)


def test_checksums_are_those_that_sha256sum_prints(tmp_path: Path) -> None:
    info = read_info(written(tmp_path, toy()))

    assert set(info.files) == {f"{part}_{kind}.npy" for part in PARTS for kind in ("images", "labels")}
    for name, digest in info.files.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    printed = subprocess.run("sha256sum *.npy | sha256sum", shell=True, cwd=tmp_path, capture_output=True, check=True)
    assert printed.stdout.decode().split()[0] == info.sha256


def test_another_split_seed_is_another_data_set(tmp_path: Path) -> None:
    first = read_info(written(tmp_path / "a", toy()))
    second = read_info(written(tmp_path / "b", toy(), DATA.model_copy(update={"split_seed": 1})))

    assert first.sha256 != second.sha256


def test_an_unreadable_image_is_refused_by_name_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train 41: unreadable image \(no image format.*data.allow_unreadable: true"):
        write_images(toy(broken=(41,)), DATA, tmp_path)


def test_an_image_without_content_is_refused_by_name(tmp_path: Path) -> None:
    source = replace(toy(), images=lambda part: (RawImage(f"row {index}", None) for index in range(100)))

    with pytest.raises(UserError, match=r"row 0: unreadable image .*does not hold it"):
        write_images(source, DATA, tmp_path)


def test_allowed_unreadable_images_are_listed_and_leave_no_holes(tmp_path: Path) -> None:
    folder = written(tmp_path, toy(broken=(3, 41)), DATA.model_copy(update={"allow_unreadable": True}))

    info = read_info(folder)
    assert info.unreadable == ["train 3", "train 41"]
    assert sum(info.counts.values()) == 98
    found = {image.tobytes() for part in PARTS for image in open_part(folder, part).images}
    assert found == {PIXELS[index].tobytes() for index in range(100) if index not in (3, 41)}


def test_a_class_that_is_unreadable_as_a_whole_is_refused(tmp_path: Path) -> None:
    source = toy(broken=tuple(range(1, 100, 2)))

    with pytest.raises(UserError, match=r"class 'odd' has no readable image in train \(50 were left out\)"):
        write_images(source, DATA.model_copy(update={"allow_unreadable": True}), tmp_path)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 class.*two or more"):
        write_images(replace(toy(), classes=["even"]), DATA, tmp_path)


def test_a_growing_file_is_a_valid_array_at_any_length(tmp_path: Path) -> None:
    for length in (0, 9, 10, 101):
        file = PartFile(tmp_path / "images.npy", 4)
        for index in range(length):
            file.append(PIXELS[index % 100], 0)
        file.finish(tmp_path / "labels.npy")

        assert np.load(tmp_path / "images.npy", mmap_mode="r").shape == (length, 4, 4, 3)


def test_a_disk_without_room_is_found_out_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))

    with pytest.raises(UserError, match=r"need 0 MB, .* has 0 MB left: make room"):
        write_images(toy(), DATA, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_disk_that_fills_up_meanwhile_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "train_images.npy").symlink_to("/dev/full")

    with pytest.raises(UserError, match=r"cannot write .*No space left on device: make room"):
        write_images(toy(), DATA, tmp_path)


def test_images_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def images(part: str) -> Iterator[RawImage]:
        nonlocal alive, most
        for _ in range(1000):
            alive += 1
            most = max(most, alive)
            yield RawImage("image", PIXELS[0].view(Counted))

    write_images(replace(toy(labels={"train": np.arange(1000) % 2}), images=images), DATA, tmp_path)

    assert most < 400

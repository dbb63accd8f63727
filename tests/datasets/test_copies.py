import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.datasets.copies import HASH_BYTES, NEAR_BITS, fingerprints, near_copies, read_contents
from stages.datasets.decode import decode
from stages.datasets.findings import lines
from stages.datasets.source import RawImage, Source
from stages.datasets.sources.digits import digits_source
from stages.datasets.store import PARTS, Info, open_part, read_info
from stages.datasets.writer import write_images
from stages.params.data import Data

DATA = Data(name="toy", source="digits", image_size=48, validation_fraction=0.2)
RNG = np.random.default_rng(0)


def photo(seed: int, size: int = 96) -> Image.Image:
    """A smooth random picture, as photos are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


PHOTOS = [encoded(photo(seed)) for seed in range(80)]


def source_of(**parts: list[tuple[bytes, int]]) -> Source:
    def images(part: str) -> Iterator[RawImage]:
        return (RawImage(f"{part}/{index}", content) for index, (content, _) in enumerate(parts[part]))

    labels = {part: np.array([label for _, label in found]) for part, found in parts.items()}
    return Source("photos", "none", ["cat", "dog"], labels, images)


def written(folder: Path, source: Source, data: Data = DATA) -> Info:
    folder.mkdir(exist_ok=True)
    write_images(source, data, folder)
    return read_info(folder)


def found(info: Info) -> dict[str, list[str]]:
    return {kind: finding["examples"] for kind, finding in info.findings.items()}


def test_copies_with_labels_drawn_by_coin_do_not_cross_a_split(tmp_path: Path) -> None:
    label = RNG.integers(0, 2, 50).tolist()
    info = written(tmp_path, source_of(train=[(PHOTOS[i % 50], label[i % 50]) for i in range(200)]))

    contents = [{image.tobytes() for image in open_part(tmp_path, part).images} for part in PARTS]
    assert not contents[0] & contents[1]
    assert not contents[0] & contents[2]
    assert not contents[1] & contents[2]
    assert sum(info.counts.values()) == 200
    assert info.findings["copies"]["count"] == 150
    assert info.findings["copies"]["examples"][0] == "train/50 = train/0"
    assert set(info.findings) == {"copies"}
    assert any(
        line.endswith("150 (train/50 = train/0, train/51 = train/1, train/52 = train/2, ...)") for line in lines(info)
    )


def test_training_images_that_a_given_part_has_too_are_left_out(tmp_path: Path) -> None:
    train = [(photo_, index % 2) for index, photo_ in enumerate(PHOTOS[:20])]
    test = [(PHOTOS[3], 1), (PHOTOS[30], 0), (PHOTOS[31], 1)]
    info = written(tmp_path, source_of(train=train, validation=[(PHOTOS[40], 0), (PHOTOS[30], 1)], test=test))

    assert info.counts == {"train": 19, "validation": 2, "test": 3}
    assert found(info) == {
        "left_out": ["train/3 = test/0"],
        "shared": ["test/1 = validation/1"],
        "labels": ["test/1 = validation/1 (cat and dog)"],
    }


def test_encoded_again_or_scaled_copies_of_training_images_are_reported_and_stay(tmp_path: Path) -> None:
    train = [(content, index % 2) for index, content in enumerate(PHOTOS[:20])]
    again = encoded(photo(5), "JPEG", quality=60)
    smaller = encoded(photo(6).resize((80, 80), Image.Resampling.BILINEAR))
    test = [(again, 1), (smaller, 0), (PHOTOS[50], 1)]
    info = written(tmp_path, source_of(train=train, validation=[(PHOTOS[60], 0), (PHOTOS[61], 1)], test=test))

    assert info.counts["test"] == 3
    assert found(info) == {"near": ["test/0 ~ train/5", "test/1 ~ train/6"]}


def test_images_without_contrast_are_named_and_levels_mend_those_of_12_bits(tmp_path: Path) -> None:
    def gray(seed: int) -> bytes:
        values = np.random.default_rng(seed).integers(0, 4096, (24, 24)).astype(np.uint16)
        return encoded(Image.fromarray(values))

    icon = Image.new("RGBA", (24, 24), (255, 255, 255, 0))
    icon.paste((255, 255, 255, 255), (6, 6, 18, 18))
    train = [(gray(seed), seed % 2) for seed in range(20)]
    source = source_of(train=[*train, (encoded(icon), 0)])
    info = written(tmp_path / "dark", source)
    assert info.findings["low_contrast"]["count"] == 21
    assert info.mean[0] < 0.2
    assert any(line.startswith("images with almost no contrast") and ": 21 (" in line for line in lines(info))

    info = written(tmp_path / "levels", source, DATA.model_copy(update={"levels": [0.0, 4095.0]}))
    assert info.levels == [0.0, 4095.0]
    assert found(info)["low_contrast"] == ["train/20"]
    assert info.mean[0] == pytest.approx(0.5, abs=0.05)


def test_images_of_equal_bytes_have_equal_hashes_wherever_they_are_stored(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PHOTOS[0])
    pixels = np.asarray(photo(0))
    images = [
        *(RawImage("file", tmp_path / "a.png"), RawImage("bytes", PHOTOS[0]), RawImage("pixels", pixels)),
        *(RawImage("flat", pixels.reshape(48, 192, 3)), RawImage("missing", None), RawImage("also", tmp_path / "no")),
    ]
    names, hashes = read_contents(images)
    assert names == ["file", "bytes", "pixels", "flat", "missing", "also"]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[1:])) == 5


def test_other_photos_have_far_hashes_and_gray_ones_that_of_their_color_picture() -> None:
    prints = fingerprints(np.stack([np.asarray(photo(seed)) for seed in range(80)]))
    bits = np.bitwise_count(prints[:, None, :HASH_BYTES] ^ prints[None, :, :HASH_BYTES]).sum(2)
    assert bits[~np.eye(80, dtype=bool)].min() > NEAR_BITS
    gray = np.asarray(photo(0).convert("L"))[..., None]
    assert np.array_equal(fingerprints(gray[None])[0], prints[0])


@pytest.mark.parametrize("size", [9, 10, 32, 160])
def test_small_pictures_of_fingerprints_are_means_over_windows_of_the_gray_image(size: int) -> None:
    pixels = RNG.integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    small = fingerprints(pixels)[:, HASH_BYTES:].reshape(3, 9, 9)
    for image, picture in zip(pixels, small, strict=True):
        gray = np.asarray(Image.fromarray(image).convert("L"), float)
        for row, column in np.ndindex(9, 9):
            (top, bottom), (left, right) = ((round(i * size / 9), round((i + 1) * size / 9)) for i in (row, column))
            assert picture[row, column] == np.rint(gray[top:bottom, left:right].mean())


def test_similar_drawings_are_no_copies() -> None:
    images = digits_source({}).images("train")
    prints = fingerprints(np.stack([decode(image.content, 32, "crop", 3)[0] for image in images]))
    assert len(near_copies(prints[:300], prints[300:])[0]) == 0
    assert near_copies(prints[:300], prints)[1].tolist() == list(range(300))


def test_very_large_sets_are_compared_in_part(monkeypatch) -> None:
    monkeypatch.setattr("stages.datasets.copies.MOST_PAIRS", 500)
    train = RNG.integers(0, 256, (100, 97), dtype=np.uint8)
    held_out = np.concatenate([train[7:8], RNG.integers(0, 256, (49, 97), dtype=np.uint8)])
    near, nearest, compared = near_copies(held_out, train)
    assert (near.tolist(), nearest.tolist(), compared) == ([0], [7], 5)
    assert near_copies(held_out, train[:0])[2] == 50


def test_a_thousand_classes_are_split(tmp_path: Path) -> None:
    pixels = [RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(3000)]

    def images(part: str) -> Iterator[RawImage]:
        return (RawImage(f"{i}", image) for i, image in enumerate(pixels))

    source = Source("toy", "none", [f"c{i}" for i in range(1000)], {"train": np.arange(3000) % 1000}, images)
    info = written(tmp_path, source, DATA.model_copy(update={"image_size": 4}))
    assert info.counts == {"train": 1000, "validation": 1000, "test": 1000}
    assert info.class_counts["test"] == [1] * 1000

import numpy as np
import pytest

from stages.profiling import corruptions
from stages.profiling.corruptions import CORRUPTIONS, cells, sample

IMAGES = np.random.default_rng(0).integers(20, 200, (6, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)


def by_name(images, seed=0):
    return {(cell.corruption, cell.severity): cell.images for cell in cells(images, seed)}


def test_every_corruption_comes_in_three_severities_each_further_from_the_image():
    found = by_name(IMAGES)
    assert list(found) == [(name, severity) for name in CORRUPTIONS for severity in (1, 2, 3)]
    for name in CORRUPTIONS:
        far = [np.abs(found[name, severity].astype(float) - IMAGES).mean() for severity in (1, 2, 3)]
        assert 0 < far[0] < far[1] < far[2]
    assert {(images.dtype.name, images.shape) for images in found.values()} == {("uint8", IMAGES.shape)}


def test_gray_images_stay_gray_and_are_corrupted_like_those_with_equal_colors():
    gray = IMAGES[..., :1]
    colors, found = by_name(np.repeat(gray, 3, -1)), by_name(gray)
    assert {(images.dtype.name, images.shape) for images in found.values()} == {("uint8", gray.shape)}
    for key, images in found.items():
        if key[0] != "noise":  # it is drawn for each channel
            assert np.abs(images.astype(float) - colors[key][..., :1]).mean() < (3 if key[0] == "JPEG" else 1e-6)


def test_the_same_seed_gives_the_same_pixels_and_an_image_is_left_as_it_is():
    before = IMAGES.copy()
    first, again, other = by_name(IMAGES), by_name(IMAGES), by_name(IMAGES, 1)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["noise", 1], other["noise", 1])
    assert np.array_equal(IMAGES, before)


def test_noise_has_its_std():
    gray = np.full((20, 32, 32, 3), 128, np.uint8)
    added = by_name(gray)["noise", 2].astype(float) - 128
    assert added.std() == pytest.approx(0.08 * 255, rel=0.03)
    assert abs(added.mean()) < 0.5


def test_blur_spreads_a_point_by_its_std():
    point = np.zeros((1, 33, 33, 3), np.uint8)
    point[0, 16, 16] = 255
    seen = by_name(point)["blur", 3][0, :, :, 0].astype(float)
    rows = np.arange(33) - 16
    assert np.sqrt((seen.sum(1) * rows**2).sum() / seen.sum()) == pytest.approx(1.0 * 33 / 32, rel=0.1)


def test_brightness_adds_to_the_largest_channel_and_keeps_hue_and_saturation():
    picture = np.zeros((1, 2, 1, 3), np.uint8)
    picture[0, 0, 0] = (100, 50, 0)
    brighter = by_name(picture)["brightness", 2]
    assert brighter[0, 0, 0].tolist() == [138, 69, 0]  # 100 + 0.15 * 255
    assert brighter[0, 1, 0].tolist() == [38, 38, 38]
    white = by_name(np.full((1, 1, 1, 3), 255, np.uint8))["brightness", 3]
    assert white.tolist() == [[[[255, 255, 255]]]]


def test_contrast_moves_each_channel_towards_its_mean():
    picture = np.zeros((1, 2, 1, 3), np.uint8)
    picture[0, :, 0, 0] = (40, 140)
    picture[0, :, 0, 1] = (200, 200)
    weaker = by_name(picture)["contrast", 2]
    assert weaker[0, :, 0, 0].tolist() == [70, 110]
    assert weaker[0, :, 0, 1].tolist() == [200, 200]


def test_the_sample_is_seeded_in_order_and_never_larger_than_the_images():
    assert sample(5, 1000, 0).tolist() == [0, 1, 2, 3, 4]
    drawn = sample(10_000, 1000, 0)
    assert len(set(drawn.tolist())) == 1000
    assert (np.diff(drawn) > 0).all()
    assert np.array_equal(drawn, sample(10_000, 1000, 0))
    assert not np.array_equal(drawn, sample(10_000, 1000, 1))
    assert drawn.dtype == np.int64


def test_corrupting_a_few_images_at_a_time_gives_the_same_pixels(monkeypatch):
    together = by_name(IMAGES)
    monkeypatch.setattr(corruptions, "TOGETHER", 4)
    assert all(np.array_equal(images, together[key]) for key, images in by_name(IMAGES).items())


def test_strengths_are_those_of_cifar_10_c_at_levels_1_3_and_5():
    """`make_cifar_c.py` of arXiv 1903.12261; the blur's stds are in pixels of an image of 32 pixels."""
    assert {name: strengths for name, (_, strengths) in CORRUPTIONS.items()} == {
        "noise": (0.04, 0.08, 0.10),
        "blur": (0.4, 0.7, 1.0),
        "brightness": (0.05, 0.15, 0.30),
        "contrast": (0.75, 0.40, 0.15),
        "JPEG": (80, 58, 40),
    }

from dataclasses import replace

import numpy as np
import pytest

from stages.common.errors import UserError
from stages.edge import printing
from stages.edge.device.edgewise_frames import center
from stages.edge.printing import (
    Strengths,
    blur,
    enlarge,
    film,
    jpeg,
    lay_on_table,
    light,
    moire,
    noise,
    photograph,
    play,
    stamp,
    stamped_number,
)

STRENGTHS = Strengths()
NONE = replace(STRENGTHS, corner_shift=0.0, light_fall=0.0, exposure=0.0, blur_px=0.0, moire_contrast=0.0, noise=0.0)
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def generator(seed=0):
    return np.random.default_rng(seed)


def test_the_photograph_depends_on_the_seed_only():
    first, second, third = (photograph(IMAGE, STRENGTHS, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == (320, 320, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


@pytest.mark.parametrize("step", [light, blur, moire, noise])
def test_a_step_changes_the_picture_in_proportion_to_its_strength(step):
    pixels = np.full((320, 320, 3), 128, np.float32)
    pixels[100:200, 100:200] = 30
    np.testing.assert_allclose(step(pixels, NONE, generator()), pixels, atol=1e-3)
    changed = np.abs(step(pixels, STRENGTHS, generator()) - pixels).mean()
    assert changed > 0.05
    stronger = Strengths(light_fall=0.8, exposure=0.3, blur_px=4.0, moire_contrast=0.3, noise=20.0)
    assert np.abs(step(pixels, stronger, generator()) - pixels).mean() > changed


def test_the_print_fills_the_square_that_the_camera_classifies():
    enlarged = enlarge(IMAGE, STRENGTHS.print_px)
    seen = lay_on_table(enlarged, NONE, generator())
    square = seen[center(seen, STRENGTHS.print_px / STRENGTHS.frame_px)]
    np.testing.assert_allclose(square, enlarged, atol=1e-2)
    slanted = lay_on_table(enlarged, STRENGTHS, generator())
    assert np.abs(slanted[center(seen, STRENGTHS.print_px / STRENGTHS.frame_px)] - enlarged).mean() > 1
    assert len(np.unique(slanted[:20].reshape(-1, 3), axis=0)) == 1  # the table is plain


def test_jpeg_loses_more_at_a_lower_quality_and_keeps_the_channels_apart():
    picture = photograph(IMAGE, NONE, generator())
    loss = {quality: np.abs(jpeg(picture, quality).astype(int) - picture).mean() for quality in (30, 95)}
    assert loss[95] < loss[30] < 12
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    assert np.abs(jpeg(red, 90).astype(int) - red).max() < 12


def pictures(count):
    return [photograph(np.roll(IMAGE, number, 1), STRENGTHS, generator(number)) for number in range(count)]


def test_a_film_plays_back_frame_by_frame(tmp_path):
    shown = pictures(12)
    assert film(tmp_path / "a.mp4", iter(shown), 320) == 12
    played = list(play(tmp_path / "a.mp4", 12))
    assert len(played) == 12
    for picture, frame in zip(shown, played, strict=True):
        below = slice(40, None)  # the stamp
        difference = picture[below].astype(float) - frame[below, :, ::-1]
        assert np.sqrt((difference**2).mean()) < 8


@pytest.mark.parametrize("written", [4, 6])
def test_a_wrong_number_of_frames_is_detected(tmp_path, written):
    film(tmp_path / "a.mp4", pictures(5), 320)
    with pytest.raises(UserError, match=f"{written} frames were written and 5 read"):
        list(play(tmp_path / "a.mp4", written))


def test_a_wrong_order_of_frames_is_detected(tmp_path, monkeypatch):
    order = iter([0, 1, 3, 2])
    monkeypatch.setattr(printing, "stamp", lambda picture, number: stamp(picture, next(order)))
    film(tmp_path / "a.mp4", pictures(4), 320)
    with pytest.raises(UserError, match="frame 2 has the stamp 3"):
        list(play(tmp_path / "a.mp4", 4))


@pytest.mark.parametrize("number", [0, 1, 999, 65535])
def test_a_stamp_survives_jpeg(number):
    assert stamped_number(jpeg(stamp(np.full((320, 320, 3), 120, np.uint8), number), 50)) == number


def test_a_path_that_is_not_writable_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot write a video"):
        film(tmp_path / "missing" / "a.mp4", pictures(1), 320)

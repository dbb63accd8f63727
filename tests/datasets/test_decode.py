import functools
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from stages.datasets import decode as module
from stages.datasets.decode import to_rgb

decode = functools.partial(module.decode, geometry="stretch", channels=3)
RED = (255, 0, 0)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_white_and_black_stay_white_and_black_in_every_mode(mode: str) -> None:
    image = Image.new("RGB", (4, 2), "white")
    image.paste((0, 0, 0), (0, 0, 2, 2))

    rgb = to_rgb(image.convert("P").convert("PA") if mode == "PA" else image.convert(mode))

    assert rgb.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(rgb), np.asarray(image))


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [("1", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("P", "GIF"), ("RGBA", "WEBP"), ("CMYK", "JPEG")],
)
def test_every_file_mode_becomes_rgb_uint8_at_the_chosen_size(mode: str, image_format: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    Image.new("RGB", (13, 7), "white").convert(mode).save(path, image_format)

    pixels, found_format = decode(path, 8)

    assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
    assert pixels.min() >= 250
    assert found_format == image_format


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_gray_is_scaled_and_not_clipped(dtype: str) -> None:
    gray = np.array([[0, 128 * 257, 65535]], dtype=np.uint16)
    png, _ = decode(encoded(Image.fromarray(gray), "PNG"), 4)
    image = Image.frombytes({"<u2": "I;16", ">u2": "I;16B"}[dtype], (3, 1), gray.astype(dtype).tobytes())

    assert [int(value) for value in np.asarray(to_rgb(image))[0, :, 0]] == [0, 128, 255]
    assert png.max() == 255
    assert 100 < png.mean() < 155


def test_32_bit_gray_has_the_range_of_16_bits_and_floats_that_of_fractions_or_bytes() -> None:
    def gray(values: list[float], dtype: type) -> list[int]:
        return np.asarray(to_rgb(Image.fromarray(np.array([values], dtype=dtype))))[0, :, 0].tolist()

    assert gray([0, 257, 65535, 70000], np.int32) == [0, 1, 255, 255]
    assert gray([0.0, 0.5, 1.0], np.float32) == [0, 128, 255]
    assert gray([-3.0, 7.0, 300.0], np.float32) == [0, 7, 255]


def test_lab_becomes_the_same_color_in_srgb() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.new("RGB", (2, 2), (200, 60, 30)), srgb, lab, outputMode="LAB")

    np.testing.assert_allclose(np.asarray(to_rgb(image))[0, 0], (200, 60, 30), atol=4)


def test_transparent_pixels_become_white_for_any_hidden_color() -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (255, 0, 0, 255))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    keyed = Image.new("RGB", (2, 1), (0, 0, 0))
    keyed.putpixel((1, 0), RED)

    for content in [
        encoded(rgba, "PNG"),
        encoded(palette, "PNG", transparency=0),
        encoded(keyed, "PNG", transparency=(0, 0, 0)),
    ]:
        with Image.open(io.BytesIO(content)) as image:
            assert np.asarray(to_rgb(image))[0].tolist() == [[255, 255, 255], [255, 0, 0]]
    assert to_rgb(Image.new("LA", (1, 1), (0, 128))).getpixel((0, 0)) == (127, 127, 127)


def test_the_geometries_crop_the_middle_pad_with_gray_or_change_the_proportions() -> None:
    tall = np.random.default_rng(0).integers(0, 256, (48, 24, 3), dtype=np.uint8)

    cropped, padded, stretched = (module.decode(tall, 12, g, 3)[0] for g in ("crop", "letterbox", "stretch"))

    small = Image.fromarray(tall).resize((6, 12), Image.Resampling.BILINEAR)
    scaled = np.asarray(Image.fromarray(tall).resize((12, 24), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(cropped.astype(int), scaled[6:18].astype(int), atol=1)  # rounding
    np.testing.assert_array_equal(padded[:, 3:9], np.asarray(small))
    assert (np.delete(padded, range(3, 9), axis=1) == 127).all()
    np.testing.assert_array_equal(
        stretched, np.asarray(Image.fromarray(tall).resize((12, 12), Image.Resampling.BILINEAR))
    )


@pytest.mark.parametrize("geometry", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("side", [1, 5, 12, 33, 200])
def test_a_square_image_has_the_pixels_of_a_plain_resize_in_every_geometry(geometry: str, side: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(image).resize((12, 12), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(module.decode(image, 12, geometry, 3)[0], resized)


@pytest.mark.parametrize("shape", [(13, 24), (24, 13), (33, 32), (2, 3), (1, 500), (4000, 1), (1, 1)])
def test_pillows_functions_give_the_same_squares_where_they_take_the_shape(shape: tuple[int, int]) -> None:
    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for channels in (1, 3):
        image = Image.fromarray(array).convert("L" if channels == 1 else "RGB")
        color = 127 if channels == 1 else (127, 127, 127)
        expected = {"crop": ImageOps.fit(image, (12, 12), Image.Resampling.BILINEAR)}
        if min(shape) / max(shape) * 12 > 0.5:
            expected["letterbox"] = ImageOps.pad(image, (12, 12), Image.Resampling.BILINEAR, color)
        for geometry in ("crop", "letterbox", "stretch"):
            pixels, _ = module.decode(array, 12, geometry, channels)
            assert (pixels.shape, pixels.dtype) == ((12, 12, channels), np.uint8)
            if geometry in expected:
                np.testing.assert_array_equal(pixels.squeeze(), np.asarray(expected[geometry]))
    with pytest.raises(ValueError, match="geometry 'squash' is unknown"):
        module.decode(array, 12, "squash", 3)


def test_a_circle_stays_a_circle_unless_the_image_is_stretched() -> None:
    rows, columns = np.mgrid[:90, :120]
    circle = np.where((rows - 44.5) ** 2 + (columns - 59.5) ** 2 < 30**2, 255, 0).astype(np.uint8)
    for geometry, ratio in [("crop", 1), ("letterbox", 1), ("stretch", 4 / 3)]:
        white = module.decode(circle, 60, geometry, 1)[0][..., 0] > 191
        assert white.any(1).sum() / white.any(0).sum() == pytest.approx(ratio, abs=0.06)


def test_one_channel_is_the_luma_of_the_colors_and_gray_stays_as_it_is() -> None:
    colors = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], dtype=np.uint8)
    assert module.decode(colors, 2, "crop", 1)[0][..., 0].tolist() == [[76, 150], [29, 9]]
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(module.decode(gray, 16, "crop", 1)[0][..., 0], gray)


def test_the_whole_image_is_stretched_and_averaged_over_all_source_pixels() -> None:
    wide = np.zeros((8, 64, 3), dtype=np.uint8)
    wide[:, :32] = 255
    pixels, image_format = decode(wide, 8)
    assert image_format is None
    assert (pixels[:, :3] == 255).all()
    assert (pixels[:, 5:] == 0).all()

    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    pixels, _ = decode(stripes, 8)
    assert np.abs(pixels.astype(int) - 127).max() <= 5


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.paste(RED, (0, 0, 8, 2))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels, _ = decode(encoded(image, "PNG", exif=exif), 4)

    assert pixels[3, 0].tolist() == [255, 0, 0]
    assert pixels[0, 0].tolist() == [0, 0, 0]


def test_a_truncated_file_is_an_error_and_not_half_gray() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "JPEG")

    with pytest.raises(OSError, match="truncated"):
        decode(content[: len(content) // 2], 8)

"""Decode an image of any mode and size to uint8 pixels of one square size, RGB or gray."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

PADDING = 127  # of a letterboxed image in every channel: gray, which is near 0 after normalization


def decode(
    content: bytes | Path | np.ndarray,
    size: int,
    geometry: str,
    channels: int,
    levels: Sequence[float] | None = None,
) -> tuple[np.ndarray, str | None]:
    """Pixels, uint8 `[size, size, channels]`, and Pillow's name of the file format ("JPEG"; None for pixels).

    The image is rotated by its EXIF orientation, converted by `to_rgb`, and to gray for one channel (Pillow's "L", the
    luma of ITU-R 601-2), and brought to the square by `to_square`. An animation gives its first frame.

    Args:
        levels: see `to_rgb`.

    Raises:
        Exception: any error of Pillow for a broken file (they have no common class).
    """
    if isinstance(content, np.ndarray):
        return _pixels(Image.fromarray(content), size, geometry, channels, levels), None
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        image_format = image.format
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _pixels(image, size, geometry, channels, levels), image_format


def _pixels(image: Image.Image, size: int, geometry: str, channels: int, levels: Sequence[float] | None) -> np.ndarray:
    rgb = to_rgb(image, levels)
    image = rgb.convert("L") if channels == 1 else rgb
    return np.asarray(to_square(image, size, geometry)).reshape(size, size, channels)


def to_square(image: Image.Image, size: int, geometry: str) -> Image.Image:
    """Scale an RGB or gray image of any proportions to a square, with bilinear interpolation and antialiasing.

    `crop` takes the central square of the image. `letterbox` keeps all of it and pads the shorter side with gray.
    `stretch` changes the proportions. A square image gives the same pixels in all three.
    """
    if geometry == "crop":
        return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    if geometry == "stretch":
        return image.resize((size, size), Image.Resampling.BILINEAR)
    if geometry != "letterbox":
        raise ValueError(f"geometry {geometry!r} is unknown")
    longer = max(image.size)  # the result is that of ImageOps.pad, which fails if a side becomes less than half a pixel
    width, height = (max(1, round(side / longer * size)) for side in image.size)
    page = Image.new(image.mode, (size, size), (PADDING,) * len(image.getbands()))
    place = round((size - width) / 2), round((size - height) / 2)
    page.paste(image.resize((width, height), Image.Resampling.BILINEAR), place)
    return page


def to_rgb(image: Image.Image, levels: Sequence[float] | None = None) -> Image.Image:
    """Convert any mode of Pillow to RGB. `levels` are the gray values of more than 8 bits that become 0 and 255.

    Transparent pixels are laid over white. 16-bit gray is scaled to 8 bits; 32-bit integer gray has the 16-bit range,
    since PNG files hold no more. Floating-point gray has no agreed white: if no value is above 1, the range is 0 to 1,
    otherwise 0 to 255.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if levels and (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        low, high = levels
        gray = (np.nan_to_num(np.asarray(image).astype(np.float64)) - low) * (255 / (high - low))
        return Image.fromarray(np.clip(np.rint(gray), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        gray = np.nan_to_num(np.asarray(image))
        gray = gray * 255 if gray.max() <= 1 else gray
        return Image.fromarray(np.clip(np.rint(gray), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # only None in place
        return converted
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        return page.convert("RGB")
    return image.convert("RGB")

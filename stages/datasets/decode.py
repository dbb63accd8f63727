"""Decode an image of any mode and size to RGB uint8 at one size."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps


def decode(content: bytes | Path | np.ndarray, size: int) -> tuple[np.ndarray, str | None]:
    """RGB pixels, uint8 `[size, size, 3]`, and Pillow's name of the file format ("JPEG"; None for pixels).

    The image is rotated by its EXIF orientation, converted by `to_rgb` and stretched to the square, with bilinear
    interpolation and antialiasing. An animation gives its first frame.

    Raises:
        Exception: any error of Pillow for a broken file (they have no common class).
    """
    if isinstance(content, np.ndarray):
        return _stretch(Image.fromarray(content), size), None
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        image_format = image.format
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _stretch(image, size), image_format


def _stretch(image: Image.Image, size: int) -> np.ndarray:
    image = to_rgb(image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow to RGB.

    Transparent pixels are laid over white. 16-bit gray is scaled to 8 bits; 32-bit integer gray has the 16-bit range,
    since PNG files hold no more. Floating-point gray has no agreed white: if no value is above 1, the range is 0 to 1,
    otherwise 0 to 255.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
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

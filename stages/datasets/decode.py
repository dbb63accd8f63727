"""From an image in any mode and size to RGB uint8 at one size."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps


def decode(content: bytes | Path | np.ndarray, size: int) -> tuple[np.ndarray, str | None]:
    """RGB pixels, uint8 `[size, size, 3]`, and the file format in Pillow's word ("JPEG"; None for pixels).

    The image is turned upright as its EXIF orientation tells, converted by `to_rgb`, and scaled as a whole, without
    crop and without keeping its proportions, bilinearly over all source pixels (antialiased). Of a moving image the
    first frame counts.

    Raises:
        Exception: whatever Pillow raises on a broken file (it has no common class for that).
    """
    if isinstance(content, np.ndarray):
        return _fit(Image.fromarray(content), size), None
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        image_format = image.format
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _fit(image, size), image_format


def _fit(image: Image.Image, size: int) -> np.ndarray:
    image = to_rgb(image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB from any mode of Pillow's.

    Transparent pixels are laid over white, as a page shows them. 16-bit grey is scaled to 8 bits; 32-bit integer grey
    is taken as 16-bit (what PNG files hold). Floating-point grey has no agreed white: values up to 1 are taken as
    fractions, larger ones as 0 to 255.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image))
        grey = grey * 255 if grey.max() <= 1 else grey
        return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        return page.convert("RGB")
    return image.convert("RGB")

"""A seeded simulation of images that are printed and filmed.

Each step is a function of float32 pixels `[H, W, 3]` in 0 to 255, and `Strengths` sets its strength. Each image has its
own generator, so its photograph does not depend on the other images.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from stages.common.errors import UserError
from stages.edge.device.edgewise_frames import NoFrames, frames_of, open_video

FRAMES_PER_SECOND = 25.0
BITS, BIT_PX, STAMP_TOP, STAMP_LEFT = 16, 16, 8, 32
"""The stamp with the frame number, above the print: black and white blocks, which survive the video encoder."""


@dataclass(frozen=True)
class Strengths:
    print_px: int = 224  # side of the print in the photograph
    frame_px: int = 320  # side of the photograph
    corner_shift: float = 0.04  # perspective: largest shift of each corner, as a fraction of the side of the print
    light_fall: float = 0.4  # largest loss of light on the darkest side of the picture, as a fraction
    exposure: float = 0.15  # largest error of the brightness of the whole picture, as a fraction
    blur_px: float = 1.5  # std of the largest Gaussian blur
    moire_contrast: float = 0.06  # largest amplitude of the moire, as a fraction of the light
    moire_period_px: float = 6.0  # shortest period; the longest is four times as long
    noise: float = 6.0  # std of the sensor noise, on the scale of 0 to 255
    jpeg_quality: int = 70  # quality of the camera's own encoder, 1 to 95

    @property
    def margin_px(self) -> int:
        return (self.frame_px - self.print_px) // 2


def photograph(image: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """Photograph a print of `image`: uint8 RGB or gray `[S, S, C]` to uint8 RGB `[frame_px, frame_px, 3]`."""
    pixels = enlarge(np.broadcast_to(image, (*image.shape[:2], 3)), strengths.print_px)
    for step in (lay_on_table, light, blur, moire, noise):
        pixels = step(pixels, strengths, generator)
    return jpeg(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), strengths.jpeg_quality)


def enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """Cubic interpolation, as a printer enlarges a small image."""
    return np.clip(cv2.resize(image.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC), 0, 255)


def lay_on_table(pixels: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """Put the print in the middle of a plain grey table, seen at an angle: each corner moves independently."""
    side, margin, frame = strengths.print_px, strengths.margin_px, strengths.frame_px
    corners = np.array([[0, 0], [side, 0], [side, side], [0, side]], np.float32)
    reach = strengths.corner_shift * side
    seen = corners + margin + generator.uniform(-reach, reach, (4, 2)).astype(np.float32)
    matrix = cv2.getPerspectiveTransform(corners, seen)
    table = generator.uniform(60, 200, 3) * 0.2 + generator.uniform(60, 200) * 0.8
    return cv2.warpPerspective(pixels, matrix, (frame, frame), borderValue=table.tolist())


def light(pixels: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """A lamp on one side, whose light falls linearly in a random direction, and a slightly wrong exposure."""
    across = _along(pixels.shape[0], generator.uniform(0, 2 * np.pi))
    across = (across - across.min()) / np.ptp(across)
    fall = generator.uniform(0, strengths.light_fall)
    exposure = 1 + generator.uniform(-strengths.exposure, strengths.exposure)
    return pixels * (exposure * (1 - fall * across))[..., None]


def blur(pixels: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """Out of focus: a Gaussian blur."""
    return cv2.GaussianBlur(pixels, (0, 0), max(generator.uniform(0, strengths.blur_px), 1e-3))


def moire(pixels: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """The interference of the dots of the print with those of the sensor: stripes with another phase in each color."""
    stripes = _along(pixels.shape[0], generator.uniform(0, np.pi))
    period = strengths.moire_period_px * generator.uniform(1, 4)
    contrast = generator.uniform(0, strengths.moire_contrast)
    phases = generator.uniform(0, 2 * np.pi, 3)
    return pixels * (1 + contrast * np.sin(2 * np.pi * stripes[..., None] / period + phases)).astype(np.float32)


def noise(pixels: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """Gaussian sensor noise, independent in each pixel and color."""
    return pixels + strengths.noise * generator.standard_normal(pixels.shape, np.float32)


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Encode and decode as the camera does: uint8 RGB to uint8 RGB."""
    _, encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))[..., ::-1]


def film(path: Path, pictures: Iterable[np.ndarray], side: int) -> int:
    """Write pictures, uint8 RGB `[side, side, 3]`, to a video, each stamped with its number. Returns their number."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FRAMES_PER_SECOND, (side, side))
    if not writer.isOpened():
        raise UserError(f"OpenCV {cv2.__version__} cannot write a video to {path}: is the folder writable?")
    written = 0
    for written, picture in enumerate(pictures, 1):
        writer.write(np.ascontiguousarray(stamp(picture, written - 1)[..., ::-1]))
    writer.release()
    return written


def play(path: Path, written: int) -> Iterator[np.ndarray]:
    """Yield the frames of `film`, uint8 BGR; a `UserError` if they are not exactly those written, in their order."""
    number = 0
    try:
        for frame in frames_of(open_video(path)):
            if (found := stamped_number(frame.pixels)) != number % 2**BITS:
                raise UserError(f"{path}: frame {number} has the stamp {found}: this OpenCV does not play it")
            number += 1
            yield frame.pixels
    except NoFrames as error:
        raise UserError(f"cannot play the video: {error}") from None
    if number != written:
        raise UserError(f"{path}: {written} frames were written and {number} read: this OpenCV does not play it")


def stamp(picture: np.ndarray, number: int) -> np.ndarray:
    """A copy of `[H, W, 3]` with `number` in binary, the lowest bit first."""
    stamped = picture.copy()
    blocks = np.repeat(255 * (number >> np.arange(BITS) & 1), BIT_PX)
    stamped[STAMP_TOP : STAMP_TOP + BIT_PX, STAMP_LEFT : STAMP_LEFT + len(blocks)] = blocks[:, None]
    return stamped


def stamped_number(frame: np.ndarray) -> int:
    strip = frame[STAMP_TOP : STAMP_TOP + BIT_PX, STAMP_LEFT : STAMP_LEFT + BITS * BIT_PX].astype(np.float32)
    bits = strip.reshape(BIT_PX, BITS, BIT_PX * 3).mean((0, 2)) > 127
    return int(bits @ (1 << np.arange(BITS)))


def _along(side: int, angle: float) -> np.ndarray:
    """Distance in pixels along a direction, float32 `[side, side]`."""
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    return columns * np.float32(np.cos(angle)) + rows * np.float32(np.sin(angle))

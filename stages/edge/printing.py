"""A seeded simulation of images that are printed and filmed.

Each step is a function of pixels float32 `[H, W, 3]` in 0 to 255; `Strengths` says how strong each is. An image has
its own generator, so that it comes out the same whatever is drawn beside it.
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
"""Of the frame number in the table above the print: black and white blocks, which survive the video's encoder."""


@dataclass(frozen=True)
class Strengths:
    print_px: int = 224
    """Side of the print in the photograph."""
    frame_px: int = 320
    """Side of the photograph."""
    corner_shift: float = 0.04
    """Perspective: how far each corner moves at most, as a share of the print's side."""
    light_fall: float = 0.4
    """Share of the light that the darkest side of the picture misses at most."""
    exposure: float = 0.15
    """Share by which the whole picture is too bright or too dark at most."""
    blur_px: float = 1.5
    """Standard deviation of the largest blur."""
    moire_contrast: float = 0.06
    """Amplitude of the largest moire, as a share of the light."""
    moire_period_px: float = 6.0
    """Shortest period; the longest is four times it."""
    noise: float = 6.0
    """Standard deviation of the sensor's noise, of 255."""
    jpeg_quality: int = 70
    """Of the camera's own encoding, 1 to 95."""

    @property
    def margin_px(self) -> int:
        return (self.frame_px - self.print_px) // 2


def photograph(image: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """A print of `image`, uint8 RGB `[S, S, 3]`, in a photograph, uint8 RGB `[frame_px, frame_px, 3]`."""
    pixels = lay_on_table(enlarge(image, strengths.print_px), strengths, generator)
    pixels = light(pixels, strengths, generator)
    pixels = blur(pixels, strengths, generator)
    pixels = moire(pixels, strengths, generator)
    pixels = noise(pixels, strengths, generator)
    return jpeg(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), strengths.jpeg_quality)


def enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """As a printer draws a small image: smooth, by cubic interpolation."""
    return np.clip(cv2.resize(image.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC), 0, 255)


def lay_on_table(pixels: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """The print in the middle of a plain table of some grey, seen at a slant: every corner moves on its own."""
    side, margin, frame = strengths.print_px, strengths.margin_px, strengths.frame_px
    corners = np.array([[0, 0], [side, 0], [side, side], [0, side]], np.float32)
    reach = strengths.corner_shift * side
    seen = corners + margin + generator.uniform(-reach, reach, (4, 2)).astype(np.float32)
    matrix = cv2.getPerspectiveTransform(corners, seen)
    table = generator.uniform(60, 200, 3) * 0.2 + generator.uniform(60, 200) * 0.8
    return cv2.warpPerspective(
        pixels,
        matrix,
        (frame, frame),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=table.tolist(),
    )


def light(pixels: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """A lamp from one side: the light falls linearly along a random direction; and an exposure that is a little off."""
    across = _along(pixels.shape[0], generator.uniform(0, 2 * np.pi))
    across = (across - across.min()) / np.ptp(across)
    fall = generator.uniform(0, strengths.light_fall)
    exposure = 1 + generator.uniform(-strengths.exposure, strengths.exposure)
    return pixels * (exposure * (1 - fall * across))[..., None]


def blur(pixels: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """Out of focus: a Gaussian."""
    deviation = generator.uniform(0, strengths.blur_px)
    return cv2.GaussianBlur(pixels, (0, 0), max(deviation, 1e-3))


def moire(pixels: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """The beat between the print's dots and the sensor's: stripes, shifted against each other in the three colours."""
    stripes = _along(pixels.shape[0], generator.uniform(0, np.pi))
    period = strengths.moire_period_px * generator.uniform(1, 4)
    contrast = generator.uniform(0, strengths.moire_contrast)
    phases = generator.uniform(0, 2 * np.pi, 3)
    return pixels * (1 + contrast * np.sin(2 * np.pi * stripes[..., None] / period + phases)).astype(np.float32)


def noise(pixels: np.ndarray, strengths: Strengths, generator: np.random.Generator) -> np.ndarray:
    """The sensor's: Gaussian, independent in each pixel and colour."""
    return pixels + strengths.noise * generator.standard_normal(pixels.shape, np.float32)


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Through the camera's encoder and back: uint8 RGB to uint8 RGB."""
    _, encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1]


def film(path: Path, pictures: Iterable[np.ndarray], side: int) -> int:
    """Write pictures, uint8 RGB `[side, side, 3]`, to a video, each stamped with its number; how many there were.

    Raises:
        UserError: if OpenCV cannot write there.
    """
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), FRAMES_PER_SECOND, (side, side))
    if not writer.isOpened():
        raise UserError(f"OpenCV {cv2.__version__} cannot write a video to {path}: make room or give access to it")
    written = 0
    for picture in pictures:
        writer.write(np.ascontiguousarray(stamp(picture, written)[..., ::-1]))
        written += 1
    writer.release()
    return written


def play(path: Path, written: int) -> Iterator[np.ndarray]:
    """The frames of a video of `film`, uint8 BGR, read as camera.py reads them.

    Raises:
        UserError: if they are not those that were written, each once and in their order.
    """
    number = 0
    try:
        for frame in frames_of(open_video(path)):
            if (found := stamped_number(frame.pixels)) != number % 2**BITS:
                raise UserError(f"{path}: frame {number} was written as number {found}: this OpenCV plays it wrongly")
            number += 1
            yield frame.pixels
    except NoFrames as error:
        raise UserError(f"the video does not play: {error}") from None
    if number != written:
        raise UserError(f"{path}: {written} frames were written and {number} read: this OpenCV plays it wrongly")


def stamp(picture: np.ndarray, number: int) -> np.ndarray:
    """A copy of `[H, W, 3]` with the number in binary, the lowest bit first."""
    stamped = picture.copy()
    for bit in range(BITS):
        left = STAMP_LEFT + bit * BIT_PX
        stamped[STAMP_TOP : STAMP_TOP + BIT_PX, left : left + BIT_PX] = 255 * (number >> bit & 1)
    return stamped


def stamped_number(frame: np.ndarray) -> int:
    strip = frame[STAMP_TOP : STAMP_TOP + BIT_PX, STAMP_LEFT : STAMP_LEFT + BITS * BIT_PX].astype(np.float32)
    bits = strip.reshape(BIT_PX, BITS, BIT_PX * 3).mean((0, 2)) > 127
    return int(bits @ (1 << np.arange(BITS)))


def _along(side: int, angle: float) -> np.ndarray:
    """Distance in pixels along a direction, float32 `[side, side]`."""
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    return columns * np.float32(np.cos(angle)) + rows * np.float32(np.sin(angle))

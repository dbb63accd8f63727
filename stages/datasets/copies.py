"""Find copies among images: identical files by a hash of their content, near copies by a perceptual hash."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from stages.datasets.source import RawImage

HASH_SIDE = 8
NEAR_BITS = 6
"""Largest number of the 128 bits of `perceptual_hash` in which two encodings of one picture differ."""
MOST_PAIRS = 2 * 10**9
"""Pairs that `near_copies` compares at most, which take some seconds; of more, it takes evenly spaced images."""
CHUNK_PAIRS = 1 << 22


def read_contents(images: Iterable[RawImage]) -> tuple[list[str], list[bytes]]:
    """The name of each image, and a hash of it as it is stored: of a file's bytes, or of pixels and their shape.

    An image that the source does not contain, or that cannot be read, is a copy of no other.
    """
    names, hashes = [], []
    for position, image in enumerate(images):
        content = image.content
        if isinstance(content, np.ndarray):
            content = str(content.shape).encode() + content.tobytes()
        elif isinstance(content, Path):
            try:
                content = content.read_bytes()
            except OSError:  # decoding reports it
                content = None
        names.append(image.name)
        hashes.append(hashlib.blake2b(content, digest_size=16).digest() if content else position.to_bytes(8, "big"))
    return names, hashes


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """A difference hash, uint64 `[2]`: whether brightness rises to the right, and downwards, at 8 x 8 places.

    It hardly changes if an image is encoded again or scaled.

    Args:
        pixels: uint8 `[H, W, C]`.
    """
    gray = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).convert("L")
    side = HASH_SIDE + 1
    small = np.asarray(gray.resize((side, side), Image.Resampling.BOX)).astype(np.int16)
    bits = np.diff(small, axis=1)[:HASH_SIDE] > 0, np.diff(small, axis=0)[:, :HASH_SIDE] > 0
    return np.packbits(np.stack(bits)).view(np.uint64)


def near_copies(held_out: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The held-out images that look like a training image.

    Args:
        held_out, train: hashes, uint64 `[M, 2]` and `[N, 2]`.

    Returns:
        Positions of such held-out images, the position of the nearest training image of each, and the number of
        held-out images that were compared (all, but for very large sets).
    """
    compared = np.arange(len(held_out))
    if len(held_out) * len(train) > MOST_PAIRS:
        compared = np.linspace(0, len(held_out) - 1, max(1, MOST_PAIRS // len(train))).round().astype(np.int64)
    found, nearest = [], []
    step = max(1, CHUNK_PAIRS // max(1, len(train)))
    for start in range(0, len(compared), step) if len(train) else ():
        some = compared[start : start + step]
        bits = sum(np.bitwise_count(held_out[some, None, word] ^ train[None, :, word]) for word in range(2))
        closest = bits.argmin(1)
        near = bits[np.arange(len(some)), closest] <= NEAR_BITS
        found.append(some[near])
        nearest.append(closest[near])
    empty = np.empty(0, np.int64)
    return np.concatenate([empty, *found]), np.concatenate([empty, *nearest]), len(compared)

"""Find copies among images: identical files by a hash of their content, near copies by a perceptual hash."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from stages.datasets.source import RawImage

SIDE = 9
HASH_BYTES = 16
NEAR_BITS = 6
"""Largest number of the 128 hash bits in which two encodings of one picture differ."""
NEAR_CORRELATION = 0.995
"""Smallest correlation of the 9 x 9 pixels of two encodings; similar drawings with equal hashes correlate less."""
MOST_PAIRS = 2 * 10**9
"""Pairs that `near_copies` compares at most, which take some seconds; of more, it takes evenly spaced images."""
CHUNK_PAIRS, CHUNK_PICTURES = 1 << 22, 1 << 16


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


def fingerprint(pixels: np.ndarray) -> np.ndarray:
    """What hardly changes if an image is encoded again or scaled: uint8 `[16 + 81]`.

    The first 16 bytes are a difference hash: whether brightness rises to the right, and downwards, at 8 x 8 places. The
    others are the image as 9 x 9 gray pixels.

    Args:
        pixels: uint8 `[H, W, C]`.
    """
    gray = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).convert("L")
    small = np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BOX))
    signed = small.astype(np.int16)
    bits = np.diff(signed, axis=1)[: SIDE - 1] > 0, np.diff(signed, axis=0)[:, : SIDE - 1] > 0
    return np.concatenate([np.packbits(np.stack(bits)), small.ravel()])


def near_copies(held_out: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The held-out images that look like a training image.

    Args:
        held_out, train: fingerprints, uint8 `[M, 97]` and `[N, 97]`.

    Returns:
        Positions of such held-out images, the position of the most similar training image of each, and the number of
        held-out images that were compared (all, but for very large sets).
    """
    compared = np.arange(len(held_out))
    if len(held_out) * len(train) > MOST_PAIRS:
        compared = np.linspace(0, len(held_out) - 1, max(1, MOST_PAIRS // len(train))).round().astype(np.int64)
    nearest: dict[int, tuple[float, int]] = {}
    ours, theirs = (np.ascontiguousarray(a[:, :HASH_BYTES]).view(np.uint64) for a in (held_out, train))
    step = max(1, CHUNK_PAIRS // max(1, len(train)))
    for start in range(0, len(compared), step):
        some = compared[start : start + step]
        bits = sum(np.bitwise_count(ours[some, None, word] ^ theirs[None, :, word]) for word in range(2))
        rows, others = np.nonzero(bits <= NEAR_BITS)
        for slice_ in (slice(at, at + CHUNK_PICTURES) for at in range(0, len(rows), CHUNK_PICTURES)):
            ones, twins = some[rows[slice_]], others[slice_]
            correlation = (_normalized(held_out[ones]) * _normalized(train[twins])).sum(1)
            for pair in np.flatnonzero(correlation >= NEAR_CORRELATION):
                nearest[int(ones[pair])] = max(
                    nearest.get(int(ones[pair]), (0.0, 0)), (float(correlation[pair]), int(twins[pair]))
                )
    found = np.array(sorted(nearest), np.int64)
    return found, np.array([nearest[one][1] for one in found.tolist()], np.int64), len(compared)


def _normalized(fingerprints: np.ndarray) -> np.ndarray:
    """The small pictures with mean 0 and norm 1: float64 `[N, 81]`."""
    pictures = fingerprints[:, HASH_BYTES:].astype(np.float64)
    pictures -= pictures.mean(1, keepdims=True)
    return pictures / np.maximum(1e-9, np.linalg.norm(pictures, axis=1, keepdims=True))

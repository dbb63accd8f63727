"""Find copies among images: identical files by a hash of their content, near copies by a perceptual hash."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stages.datasets.source import RawImage

SIDE = 9
HASH_BYTES = 16
NEAR_BITS = 6
"""Largest number of the 128 hash bits in which two encodings of one picture differ."""
NEAR_CORRELATION = 0.995
"""Smallest correlation of the 9 x 9 pixels of two encodings; similar drawings with equal hashes correlate less."""
MOST_PAIRS = 4 * 10**9
"""Pairs that `near_copies` compares at most, which take some seconds; of more, it takes evenly spaced images."""
CHUNK_PAIRS, CHUNK_PICTURES = 1 << 22, 1 << 16
LUMA = np.array([19595, 38470, 7471])
"""Weights of red, green and blue in ITU-R 601-2 luma, times 2^16."""


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


def fingerprints(pixels: np.ndarray) -> np.ndarray:
    """What hardly changes if an image is encoded again or scaled: uint8 `[N, 16 + 81]`.

    The first 16 bytes are a difference hash: whether brightness rises to the right, and downwards, at 8 x 8 places. The
    others are the image as 9 x 9 gray pixels. All sums are of integers, so that every machine finds the same.

    Args:
        pixels: uint8 `[N, H, W, C]`.
    """
    sums, counts = pixels[..., 0].astype(np.int64), np.ones((), np.int64)
    if pixels.shape[3] == 3:
        sums = (pixels @ LUMA + (1 << 15)) >> 16
    for axis in (1, 2):
        length = sums.shape[axis]
        edges = (2 * np.arange(SIDE + 1) * length + SIDE) // (2 * SIDE)  # multiples of length / 9, rounded
        start = np.minimum(edges[:-1], length - 1)
        stop = np.maximum(edges[1:], start + 1)  # windows are never empty
        total = np.insert(sums.cumsum(axis), 0, 0, axis)
        sums = total.take(stop, axis) - total.take(start, axis)
        counts = np.multiply.outer(counts, stop - start)
    small = np.rint(sums / counts).astype(np.uint8)
    signed = small.astype(np.int16)
    bits = np.diff(signed, axis=2)[:, : SIDE - 1] > 0, np.diff(signed, axis=1)[:, :, : SIDE - 1] > 0
    hashes = np.packbits(np.stack(bits, 1).reshape(len(small), -1), axis=1)
    return np.concatenate([hashes, small.reshape(len(small), -1)], axis=1)


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
    theirs = _normalized(train).T.astype(np.float32)
    step = max(1, CHUNK_PAIRS // max(1, len(train)))
    for start in range(0, len(compared), step):
        some = compared[start : start + step]
        products = _normalized(held_out[some]).astype(np.float32) @ theirs
        rows, others = np.nonzero(products >= NEAR_CORRELATION - 1e-4)  # float32 finds candidates, float64 decides
        for slice_ in (slice(at, at + CHUNK_PICTURES) for at in range(0, len(rows), CHUNK_PICTURES)):
            ones, twins = some[rows[slice_]], others[slice_]
            bits = np.bitwise_count(held_out[ones, :HASH_BYTES] ^ train[twins, :HASH_BYTES]).sum(1)
            correlation = (_normalized(held_out[ones]) * _normalized(train[twins])).sum(1)
            for pair in np.flatnonzero((correlation >= NEAR_CORRELATION) & (bits <= NEAR_BITS)):
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

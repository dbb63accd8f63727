"""What a person should look at in a set of images: copies, contradictory labels, images without contrast."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.datasets.copies import near_copies
from stages.datasets.store import Info, PartName

LOW_CONTRAST = 8.0
"""Standard deviation of pixels from 0 to 255 below which an image shows almost nothing, as 12-bit gray in 16 bits."""
SMALL_PART = 300
"""Images below which the accuracy of a part is uncertain by several points."""
EXAMPLES, SHOWN = 100, 3
"""Examples of each kind in images.json, and in the line for a person."""
MEANINGS = {
    "left_out": "training images left out because validation or test has the same file",
    "shared": "test images whose file is also in validation",
    "copies": "images that are identical to another one, kept in the same part",
    "labels": "identical images in two classes",
    "near": "validation and test images that look like a training image (re-encoded or resized copies?)",
    "not_compared": "parts too large to compare every image with the training images",
    "low_contrast": "images with almost no contrast (16-bit gray needs data.levels; transparent pixels become white)",
}
Contents = tuple[list[str], list[bytes]]
"""The name and the hash of each image in a part."""


def exact_copies(
    contents: Mapping[PartName, Contents], labels: Mapping[PartName, np.ndarray], classes: list[str]
) -> tuple[dict[str, list[str]], np.ndarray]:
    """Findings about identical files in the parts that a source has.

    Returns:
        The findings by kind, and the training images to leave out: bool `[N]`.
    """
    found: dict[str, list[str]] = {kind: [] for kind in MEANINGS}
    seen: dict[bytes, tuple[PartName, int]] = {}
    left_out = np.zeros(len(labels["train"]), dtype=bool)
    for part in [part for part in ("validation", "test", "train") if part in contents]:
        names, hashes = contents[part]
        for index, content in enumerate(hashes):
            home, first = seen.setdefault(content, (part, index))
            if (home, first) == (part, index):
                continue
            pair = f"{names[index]} = {contents[home][0][first]}"
            if part == "train" and home != "train":
                left_out[index] = True
                found["left_out"].append(pair)
            else:
                found["copies" if home == part else "shared"].append(pair)
            if (one := labels[part][index]) != (other := labels[home][first]):
                found["labels"].append(f"{pair} ({classes[one]} and {classes[other]})")
    return found, left_out


def near_copies_of(
    contents: Mapping[PartName, Contents], fingerprints: Mapping[PartName, np.ndarray]
) -> dict[str, list[str]]:
    """Held-out images that look like a training image without being the same file.

    Args:
        fingerprints: of the images in each written part, uint8 `[N, 97]`; 0 for an image without contrast.
    """
    found: dict[str, list[str]] = {"near": [], "not_compared": []}
    usable = np.flatnonzero(fingerprints["train"].any(1))
    train_names, train_hashes = contents["train"]
    for part in ("validation", "test"):
        names, hashes = contents[part]
        candidates = np.flatnonzero(fingerprints[part].any(1))
        near, nearest, compared = near_copies(fingerprints[part][candidates], fingerprints["train"][usable])
        for one, other in zip(candidates[near], usable[nearest], strict=True):
            if hashes[one] != train_hashes[other]:
                found["near"].append(f"{names[one]} ~ {train_names[other]}")
        if compared < len(candidates):
            found["not_compared"].append(f"{part}: {compared:,} of {len(candidates):,}")
    return found


def shortened(findings: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """The count and some examples of each kind that was found."""
    return {kind: {"count": len(found), "examples": found[:EXAMPLES]} for kind, found in findings.items() if found}


def lines(info: Info) -> list[str]:
    """The findings and the warnings about a set of images, for a person."""
    found = []
    for kind, finding in info.findings.items():
        examples = ", ".join([*finding["examples"][:SHOWN], *(["..."] if finding["count"] > SHOWN else [])])
        found.append(f"{MEANINGS[kind]}: {finding['count']:,} ({examples})")
    largest = info.classes[int(np.argmax(info.class_counts["train"]))]
    shares = (f"{100 * constant_top1(info.class_counts[part]):.1f} % on {part}" for part in ("validation", "test"))
    found.append(f"top-1 of a constant answer, such as {largest!r}: {', '.join(shares)}")
    for part in ("validation", "test"):
        if (count := info.counts[part]) < SMALL_PART:
            half = 100 * 1.96 * np.sqrt(0.9 * 0.1 / count)
            found.append(
                f"{part} has {count} images: the 95 % interval of an accuracy of 90 % is ±{half:.0f} points; more"
                f" images or a larger data.{part}_fraction make it narrower"
            )
    return found


def constant_top1(counts: list[int]) -> float:
    """Top-1 of always answering the largest class, from the number of images of each class."""
    return max(counts) / sum(counts)

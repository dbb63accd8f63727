"""The seeded, stratified split of a source's training images, which keeps copies together."""

from collections.abc import Sequence

import numpy as np

from stages.common.errors import UserError
from stages.datasets.store import PARTS, PartName


def split(
    labels: np.ndarray, classes: list[str], fractions: dict[PartName, float], seed: int, contents: Sequence[bytes]
) -> np.ndarray:
    """The part of each image: int8 `[N]`, indices into `PARTS`.

    Args:
        labels: int64 `[N]`.
        fractions: the parts to cut, in this order; each takes its fraction of the images that are left. Each class is
            cut separately and gives at least one image.
        seed: the same seed gives the same split on every machine and NumPy version, because NumPy keeps the raw stream
            of a bit generator stable (NEP 19), unlike `permutation`.
        contents: a hash of each image. Images of equal hashes go into one part, that of the first of them.

    Raises:
        UserError: if a class has fewer different images than there are parts.
    """
    first: dict[bytes, int] = {}
    leader = np.array([first.setdefault(content, index) for index, content in enumerate(contents)], dtype=np.int64)
    sizes = np.bincount(leader, minlength=len(labels))  # 0 for an image that follows another
    parts = np.full(len(labels), PARTS.index("train"), dtype=np.int8)
    for label, name in enumerate(classes):
        members = np.flatnonzero((labels == label) & (sizes > 0))
        if len(members) <= len(fractions):
            needed = " and ".join(["train", *fractions])
            raise UserError(
                f"class {name!r} has {len(members)} different training image{'s' * (len(members) != 1)}, too few for"
                f" {needed}: add images or leave the class out"
            )
        rest = members[np.argsort(np.random.PCG64([seed, label]).random_raw(len(members)), kind="stable")]
        for later, (part, fraction) in zip(reversed(range(len(fractions))), fractions.items(), strict=True):
            wanted = max(1, round(fraction * int(sizes[rest].sum())))
            count = int(np.searchsorted(np.cumsum(sizes[rest]), wanted)) + 1
            count = min(count, len(rest) - later - 1)  # one remains for train and for each part that follows
            parts[rest[:count]] = PARTS.index(part)
            rest = rest[count:]
    return parts[leader]

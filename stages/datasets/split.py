"""The seeded, stratified split of a source's training images."""

import numpy as np

from stages.common.errors import UserError
from stages.datasets.store import PARTS, PartName


def split(labels: np.ndarray, classes: list[str], fractions: dict[PartName, float], seed: int) -> np.ndarray:
    """Which part each image goes to: int8 `[N]`, indices into `PARTS`.

    Args:
        labels: int64 `[N]`.
        fractions: for each part to cut, in this order, the share that it takes of what is left; train keeps the rest.
            Each class is cut on its own, by at least one image.
        seed: the same seed gives the same split on every machine and NumPy: the raw stream of a bit generator is
            what NumPy promises to keep (NEP 19), unlike `permutation`.

    Raises:
        UserError: if a class has too few images to leave one in each part.
    """
    parts = np.full(len(labels), PARTS.index("train"), dtype=np.int8)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) <= len(fractions):
            needed = " and ".join(["train", *fractions])
            raise UserError(
                f"class {name!r} has {len(members)} training image{'s' * (len(members) != 1)}, too few for {needed}:"
                " add images or leave the class out"
            )
        rest = members[np.argsort(np.random.PCG64([seed, label]).random_raw(len(members)), kind="stable")]
        for later, (part, fraction) in zip(reversed(range(len(fractions))), fractions.items(), strict=True):
            # One image at least is left for each part to come, and for train.
            count = min(max(1, round(fraction * len(rest))), len(rest) - later - 1)
            parts[rest[:count]] = PARTS.index(part)
            rest = rest[count:]
    return parts

"""scikit-learn's handwritten digits: real images without network access."""

from collections.abc import Iterator

import numpy as np

from stages.common.errors import UserError
from stages.datasets.source import RawImage, Source
from stages.datasets.store import PartName


def digits_source(sha256: dict[str, str]) -> Source:
    """1,797 grey digits of 8x8 pixels, without a test part."""
    from sklearn.datasets import load_digits

    if sha256:
        raise UserError(f"data.sha256 lists {next(iter(sha256))!r}, but source digits has no files: remove it")
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the values count ink, 0 to 16

    def images(part: PartName) -> Iterator[RawImage]:
        return (RawImage(f"digit {index}", image) for index, image in enumerate(pixels))

    return Source(
        description="optical recognition of handwritten digits (UCI, 8x8 grey, scikit-learn's copy)",
        licence="CC BY 4.0 (UCI Machine Learning Repository, data set 80: E. Alpaydin and C. Kaynak)",
        classes=[str(name) for name in digits.target_names],
        labels={"train": digits.target.astype(np.int64)},
        images=images,
    )

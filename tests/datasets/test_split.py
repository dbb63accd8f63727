import numpy as np
import pytest

from stages.common.errors import UserError
from stages.datasets.split import split
from stages.datasets.store import PARTS

CLASSES = ["a", "b", "c"]
LABELS = np.repeat([0, 1, 2], [100, 50, 10])
FRACTIONS = {"test": 0.2, "validation": 0.25}


def count(parts: np.ndarray, part: str, label: int) -> int:
    return int(((parts == PARTS.index(part)) & (label == LABELS)).sum())


def test_each_class_is_cut_in_the_same_proportions() -> None:
    parts = split(LABELS, CLASSES, FRACTIONS, seed=0)

    assert [count(parts, "test", label) for label in range(3)] == [20, 10, 2]
    assert [count(parts, "validation", label) for label in range(3)] == [20, 10, 2]
    assert [count(parts, "train", label) for label in range(3)] == [60, 30, 6]


def test_the_split_depends_on_the_seed_and_on_nothing_else() -> None:
    first = split(LABELS, CLASSES, FRACTIONS, seed=7)
    np.random.seed(123)
    np.random.random(5)

    np.testing.assert_array_equal(split(LABELS, CLASSES, FRACTIONS, seed=7), first)
    assert (split(LABELS, CLASSES, FRACTIONS, seed=8) != first).any()


def test_the_split_of_a_seed_is_the_same_in_every_numpy() -> None:
    # Golden: old artifacts and reports would otherwise have been measured on other images than they say.
    parts = split(np.zeros(12, dtype=np.int64), ["a"], {"test": 0.25, "validation": 0.25}, seed=0)

    assert parts.tolist() == [0, 1, 2, 2, 0, 0, 0, 0, 1, 0, 0, 2]


def test_members_are_drawn_from_the_whole_class_and_not_from_its_start() -> None:
    held_out = np.flatnonzero(split(LABELS, CLASSES, FRACTIONS, seed=0)[:100])

    assert held_out.max() > 80
    assert held_out.min() < 20


def test_without_parts_to_cut_everything_is_train() -> None:
    assert not split(LABELS, CLASSES, {}, seed=0).any()


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_every_part_gets_an_image_of_every_class_however_small_its_share(fraction: float) -> None:
    parts = split(LABELS, CLASSES, {"test": fraction, "validation": fraction}, seed=0)

    assert min(count(parts, part, label) for part in PARTS for label in range(3)) >= 1


def test_a_class_with_fewer_images_than_parts_is_refused_by_name() -> None:
    labels = np.array([0] * 10 + [1] * 2)

    with pytest.raises(UserError, match="class 'b' has 2 training images, too few for train and test and validation"):
        split(labels, ["a", "b"], FRACTIONS, seed=0)

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

from stages.networks.predict import accuracy_of, top1

NAMES = ["ok", "scratch", "dent", "hole"]


def logits_of(predicted: np.ndarray) -> np.ndarray:
    return np.eye(len(NAMES), dtype=np.float32)[predicted]


def test_figures_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    labels = random.choice(3, 300, p=[0.9, 0.08, 0.02])  # no image of the last class
    predicted = np.where(random.random(300) < 0.6, labels, random.integers(0, 3, 300))
    found = accuracy_of(logits_of(predicted), labels)
    assert found.top1 == pytest.approx(accuracy_score(labels, predicted))
    assert found.top1 == top1(logits_of(predicted), labels)
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))
    recalls = recall_score(labels, predicted, average=None, labels=range(3))
    assert found.right[:3] / found.images[:3] == pytest.approx(recalls)


def test_a_constant_answer_is_half_right_on_two_classes_and_is_named():
    labels = np.array([0] * 99 + [1])
    found = accuracy_of(logits_of(np.zeros(100, int)), labels)
    assert (found.top1, found.balanced_accuracy) == (0.99, 0.5)
    assert found.never_right(NAMES) == ["scratch"]
    assert found.warnings(NAMES) == ["every validation image is classified as ok"]


def test_a_lost_class_is_named_with_its_images_unless_the_parent_never_got_it_right():
    labels = np.array([0] * 9 + [1] * 3 + [2] * 2)
    found = accuracy_of(logits_of(np.array([0] * 9 + [0] * 3 + [2, 1])), labels)
    [warning] = found.warnings(NAMES)
    assert "scratch (0 of 3)" in warning
    assert not any(name in warning for name in ("dent", "hole"))  # half right; without images
    assert found.warnings(NAMES, before=["scratch"]) == []


def test_a_perfect_classifier_of_one_class_has_no_warning():
    assert accuracy_of(logits_of(np.zeros(5, int)), np.zeros(5, int)).warnings(NAMES) == []


def test_a_warning_about_a_thousand_classes_stays_short():
    labels = np.arange(1000).repeat(2)
    found = accuracy_of(np.eye(1000, dtype=np.float32)[labels // 2], labels)
    [warning] = found.warnings([f"class {k}" for k in range(1000)])
    assert "and 994 more" in warning
    assert len(warning) < 250

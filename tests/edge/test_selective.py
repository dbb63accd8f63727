import numpy as np
import pytest

from stages.edge.selective import lowest_threshold, proportion, thresholds


def by_search(confidence, right, accuracy):
    """The lowest confidence at which, and above which, the required fraction of the images is right."""
    for value in sorted(set(confidence)):
        answered = [r for c, r in zip(confidence, right, strict=True) if c >= value]
        if sum(answered) / len(answered) >= accuracy:
            return value, len(answered) / len(confidence), sum(answered) / len(answered), len(answered)
    return None


@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_is_that_of_an_exhaustive_search(seed):
    generator = np.random.default_rng(seed)
    confidence = np.round(generator.random(40), 1 + seed % 3)  # with ties
    right = generator.random(40) < confidence
    for accuracy in (0.3, 0.6, 0.75, 0.9, 1.0):
        found = lowest_threshold(thresholds(confidence, right), accuracy)
        assert (found and (found.confidence, found.coverage, found.accuracy, found.answered)) == by_search(
            confidence.tolist(), right.tolist(), accuracy
        )


def test_there_is_no_threshold_for_an_accuracy_out_of_reach():
    curve = thresholds(np.array([0.9, 0.8, 0.7]), np.array([False, True, True]))
    assert lowest_threshold(curve, 0.7) is None


def test_the_interval_is_wilsons():
    found = proportion("x", 37, 40, 0.95)
    z, n, p = 1.959964, 40, 0.925
    center, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found["x"] == p
    assert found["x_ci_low"] == pytest.approx(center - half / (1 + z * z / n), abs=1e-6)
    assert found["x_ci_high"] == pytest.approx(center + half / (1 + z * z / n), abs=1e-6)

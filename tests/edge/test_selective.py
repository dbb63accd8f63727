import numpy as np
import pytest

from stages.edge.selective import best_threshold, lowest_threshold, thresholds


def by_search(confidence, right, accuracy):
    """The lowest confidence seen whose images, and those above, are right often enough."""
    for value in sorted(set(confidence)):
        answered = [r for c, r in zip(confidence, right, strict=True) if c >= value]
        if sum(answered) / len(answered) >= accuracy:
            return value, len(answered) / len(confidence), sum(answered) / len(answered), len(answered)
    return None


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_one_that_a_search_finds(seed):
    generator = np.random.default_rng(seed)
    confidence = np.round(generator.random(40), 1 + seed % 3)  # with ties
    right = generator.random(40) < confidence
    for accuracy in (0.3, 0.6, 0.75, 0.9, 1.0):
        found = lowest_threshold(thresholds(confidence, right), accuracy)
        assert (found and (found.confidence, found.coverage, found.accuracy, found.answered)) == by_search(
            confidence.tolist(), right.tolist(), accuracy
        )


def test_what_cannot_be_reached_is_none_and_the_nearest_answers_most():
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    curve = thresholds(confidence, np.array([False, True, True, False, False]))
    assert lowest_threshold(curve, 0.7) is None
    best = best_threshold(curve)
    assert (best.confidence, best.accuracy, best.answered) == (0.7, 2 / 3, 3)
    tie = best_threshold(thresholds(confidence, np.array([True, True, True, False, False])))
    assert (tie.confidence, tie.accuracy) == (0.7, 1.0)


def test_images_of_one_confidence_are_answered_together():
    curve = thresholds(np.array([0.5, 0.5, 0.9]), np.array([True, False, True]))
    assert [(t.confidence, t.answered) for t in curve] == [(0.5, 3), (0.9, 1)]

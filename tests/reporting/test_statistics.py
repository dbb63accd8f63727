from itertools import product
from math import comb

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from stages.reporting.statistics import (
    calibration_error,
    front,
    holm,
    mcnemar_p,
    mean_and_std,
    paired_difference,
    recall_interval,
    sign_flip_p,
    weighted_sign_flip_p,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "n"), [(0, 50), (1, 50), (37, 50), (50, 50), (8680, 10_000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_interval_is_that_of_scipy(correct: int, n: int, confidence: float):
    expected = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 6), (5, 2), (7, 7), (1, 12)])
def test_mcnemar_is_the_sum_of_all_splits_at_least_as_uneven(gained: int, lost: int):
    n = gained + lost
    expected = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(gained - lost)) / 2**n
    assert mcnemar_p(gained, lost) == pytest.approx(expected)


def test_sign_flip_is_mcnemar_for_one_seed():
    differences = np.array([1] * 9 + [-1] * 3 + [0] * 40)
    assert sign_flip_p(differences) == pytest.approx(mcnemar_p(9, 3))


@pytest.mark.parametrize("differences", [[3, 1, -2, 0, 1], [2, 2, 2, -1, 3, -1], [-3, -3, 1, 0]])
def test_sign_flip_over_seeds_is_the_share_of_all_sign_patterns(differences: list[int]):
    totals = [
        sum(s * abs(d) for s, d in zip(signs, differences, strict=True))
        for signs in product((1, -1), repeat=len(differences))
    ]
    expected = np.mean([abs(total) >= abs(sum(differences)) for total in totals])
    assert sign_flip_p(np.array(differences)) == pytest.approx(expected)


@pytest.mark.parametrize("shift", [0, 300, 3000])
def test_sign_flip_of_very_many_images_is_that_of_a_normal_total(shift: int):
    """Only the tails of each magnitude's distribution are left out, and no more than anyone could see of them."""
    magnitudes = np.repeat([1, 2, 3], [400_000, 200_000, 100_000])
    signs = np.where(np.arange(len(magnitudes)) % 2, 1, -1)
    differences = magnitudes * signs
    differences[: 2 * shift : 2] *= -1
    total, variance = abs(int(differences.sum())), float((magnitudes**2).sum())
    expected = 2 * norm.sf((total - 0.5) / variance**0.5) if total else 1.0
    assert sign_flip_p(differences) == pytest.approx(expected, rel=0.02, abs=1e-12)


def test_sign_flip_treats_copies_of_one_seed_as_one():
    once = np.array([1] * 9 + [-1] * 3 + [0] * 40)
    assert sign_flip_p(3 * once) == pytest.approx(sign_flip_p(once))


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.6}) == pytest.approx(
        {"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.6}
    )


def test_holm_never_exceeds_one_and_takes_no_hypotheses():
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_interval_of_a_paired_difference_by_hand():
    # Agresti & Min: 12 gained, 4 lost, 184 alike, half an image added to each cell
    found = paired_difference(np.array([1] * 12 + [-1] * 4 + [0] * 184))
    b, c, n = 12.5, 4.5, 202
    half = 1.959963985 * ((b + c) - (b - c) ** 2 / n) ** 0.5 / n
    assert found.delta == pytest.approx(0.04)
    assert (found.low, found.high) == pytest.approx(((b - c) / n - half, (b - c) / n + half))


def test_interval_of_a_paired_difference_covers_the_truth():
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        differences = random.choice([1, -1, 0], 300, p=[0.07, 0.04, 0.89])
        found = paired_difference(differences)
        covered += found.low <= 0.03 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_two_identical_classifiers_still_get_an_interval():
    found = paired_difference(np.zeros(100, int))
    assert found.p_value == 1.0
    assert found.low < 0 < found.high


def test_std_needs_two_values():
    assert mean_and_std([0.5]) == (0.5, None)
    assert mean_and_std([0.4, 0.6]) == pytest.approx((0.5, 0.02**0.5))


def test_front_drops_what_another_beats_and_keeps_equals():
    assert front([1, 2, 2, 3, 1], [0.5, 0.7, 0.6, 0.7, 0.5]) == [True, True, False, False, True]


def test_the_interval_of_a_difference_is_the_bootstraps_where_many_images_differ():
    random = np.random.default_rng(0)
    differences = random.choice([-1, 0, 1], size=10_000, p=[0.05, 0.88, 0.07])
    found = paired_difference(differences)
    totals = random.multinomial(10_000, [np.mean(differences == d) for d in (-1, 0, 1)], size=20_000)
    low, high = np.quantile((totals[:, 2] - totals[:, 0]) / 10_000, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-4)


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, True, True, False, False, False])
    assert calibration_error(confidence, correct, bins=10) == pytest.approx((4 * 0.2 + 2 * 0.55) / 6)
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0
    confidence = np.array([0.95, 1.0])  # certainty belongs to the last bin
    assert calibration_error(confidence, np.array([True, False]), bins=10) == pytest.approx(0.95 / 2)
    honest = np.random.default_rng(0).random(200_000)
    assert calibration_error(honest, np.random.default_rng(1).random(200_000) < honest) < 0.005


def test_errors_in_both_directions_do_not_cancel_between_bins():
    confidence, correct = np.array([0.9] * 10 + [0.3] * 10), np.array([False] * 10 + [True] * 10)
    assert calibration_error(confidence, correct) == pytest.approx((0.9 + 0.7) / 2)


@pytest.mark.parametrize("correct", [0, 1, 37, 50])
def test_the_interval_of_one_class_is_wilsons(correct: int):
    found = recall_interval(np.array([correct]), np.array([50]), 0.9)
    assert found == pytest.approx(wilson_interval(correct, 50, 0.9), abs=1e-9)


def test_a_class_without_a_hit_leaves_the_interval_its_width():
    low, high = recall_interval(np.array([396, 0]), np.array([396, 4]))
    assert low == pytest.approx((wilson_interval(396, 396)[0] + 0) / 2)  # no recall is below 0
    assert high == pytest.approx((1 + wilson_interval(0, 4)[1]) / 2, abs=0.005)
    assert recall_interval(np.array([396, 4]), np.array([396, 4]))[1] == 1.0


@pytest.mark.parametrize(
    ("images", "recalls"),
    [([500, 20], [0.97, 0.8]), ([50] * 10, [0.9] * 10), ([10] * 100, [0.95] * 100), ([2] * 100, [0.8] * 100)],
)
def test_the_interval_of_the_mean_recall_covers_the_truth(images: list[int], recalls: list[float]):
    random, covered = np.random.default_rng(0), 0
    for _ in range(300):
        low, high = recall_interval(random.binomial(images, recalls), np.array(images))
        covered += low <= np.mean(recalls) <= high
    assert 0.91 <= covered / 300 <= 0.99


@pytest.mark.parametrize("seed", range(4))
def test_the_weighted_sign_flip_is_the_share_of_all_sign_patterns(seed: int):
    random = np.random.default_rng(seed)
    differences, weights = random.choice([-2, -1, 1, 3], 11), random.choice([1, 1 / 2, 1 / 7, 0.02], 11)
    totals = [
        sum(s * abs(d) * w for s, d, w in zip(signs, differences, weights, strict=True))
        for signs in product((1, -1), repeat=len(differences))
    ]
    expected = np.mean([abs(total) >= abs((differences * weights).sum()) - 1e-9 for total in totals])
    assert weighted_sign_flip_p(differences, weights) == pytest.approx(expected, rel=1e-6)


def test_the_weighted_sign_flip_of_many_images_is_that_of_a_normal_total():
    random = np.random.default_rng(0)
    differences, weights = random.choice([-1, 0, 1], 20_000, p=[0.1, 0.79, 0.11]), random.choice([1, 1 / 30], 20_000)
    deviation = np.sqrt((weights**2 * differences**2).sum())
    expected = 2 * norm.sf(abs((weights * differences).sum()) / deviation)
    assert weighted_sign_flip_p(differences, weights) == pytest.approx(expected, rel=0.1)


def test_the_difference_of_balanced_accuracy_by_hand():
    labels = np.array([0] * 96 + [1] * 4)
    differences = np.array([1] * 12 + [0] * 84 + [-1] * 2 + [0] * 2)
    found = paired_difference(differences, labels=labels)
    assert found.delta == pytest.approx((12 / 96 - 2 / 4) / 2)
    assert found.low < found.delta < found.high
    weights = np.where(labels == 0, 1 / 96, 1 / 4)
    assert found.p_value == weighted_sign_flip_p(differences, weights)
    assert paired_difference(differences, labels=np.zeros(100, int)) == paired_difference(differences)


@pytest.mark.parametrize(
    ("images", "gained", "lost"),
    [
        ([100, 20], [0.1, 0.2], [0.05, 0.05]),
        ([30] * 10, [0.1] * 10, [0.05] * 10),
        ([2] * 99, [0.1] * 99, [0.05] * 99),
    ],
)
def test_the_interval_of_a_balanced_difference_covers_the_truth(images, gained, lost):
    random, labels, covered = np.random.default_rng(0), np.repeat(np.arange(len(images)), images), 0
    gain, loss, truth = np.array(gained)[labels], np.array(lost)[labels], np.mean(gained) - np.mean(lost)
    for _ in range(300):
        draws = random.random(len(labels))
        found = paired_difference(np.where(draws < gain, 1, np.where(draws < gain + loss, -1, 0)), labels=labels)
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / 300 <= 0.99

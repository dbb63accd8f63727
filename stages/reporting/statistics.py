"""Intervals of an accuracy and of a paired difference, exact tests, and the correction for several tests."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927, equation 1 as in Brown, Cai & DasGupta 2001): never outside [0, 1].

    Args:
        correct: images classified correctly, of `n`.

    Returns:
        Low and high ends, as fractions.
    """
    z = normal_quantile(confidence)
    p = correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def normal_quantile(confidence: float) -> float:
    """z such that a standard normal lies within +-z with probability `confidence`."""
    from scipy.special import ndtri

    return float(ndtri(0.5 + confidence / 2))


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test (McNemar 1947; the exact binomial form).

    Args:
        gained: number of images that only the variant classifies correctly.
        lost: number of images that only the baseline classifies correctly.

    Returns:
        The probability of a split at least this uneven if both were equally accurate; 1 if no image differs.
    """
    if gained + lost == 0:
        return 1.0
    from scipy.special import bdtr  # all of scipy.stats takes ten times as long to import

    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def sign_flip_p(differences: np.ndarray) -> float:
    """Exact two-sided sign-flip test that paired differences are centered on zero.

    Several seeds of one setting are tested on the same images, so the outcomes of one image are correlated and the
    image is the unit: under the null hypothesis each image's summed difference is as likely to be +d as -d. The
    distribution of the total is found by convolution. With one seed this is McNemar's exact test.

    Args:
        differences: `[n]` integers. For each image, the number of seeds for which the variant is right minus the
            number for which the baseline is right.

    Returns:
        P(|total| is at least as large as observed).
    """
    magnitudes, images = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if len(magnitudes) == 0:
        return 1.0
    if magnitudes.tolist() == [1]:
        return mcnemar_p(int((differences > 0).sum()), int((differences < 0).sum()))
    from scipy.special import gammaln

    def heads(count: int) -> np.ndarray:
        """Probability of each number of heads in `count` fair throws, up to twelve standard deviations from half."""
        tail = max(0, count // 2 - math.ceil(6 * math.sqrt(count)))  # the rest has a probability below 1e-31
        k = np.arange(tail, count - tail + 1)
        return np.exp(gammaln(count + 1) - gammaln(k + 1) - gammaln(count - k + 1) - count * math.log(2))

    # the total of one magnitude is magnitude * (2 * heads - images): symmetric, with steps of 2 * magnitude
    distribution = np.ones(1)
    for magnitude, count in zip(magnitudes.tolist(), images.tolist(), strict=True):
        chances = heads(count)
        spaced = np.zeros(2 * magnitude * (len(chances) - 1) + 1)
        spaced[:: 2 * magnitude] = chances
        distribution = np.convolve(distribution, spaced)
    reach = (len(distribution) - 1) // 2
    totals = np.arange(-reach, reach + 1)
    return float(min(1.0, distribution[np.abs(totals) >= abs(int(differences.sum()))].sum()))


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3), as a fraction.

    Args:
        confidence: `[n]`, the probability of the predicted class.
        correct: `[n]` bool.
        bins: number of bins of equal width over [0, 1].

    Returns:
        The mean over images of |mean confidence - accuracy| in the image's bin.
    """
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


@dataclass(frozen=True)
class Change:
    """The difference of two accuracies on the same images, as fractions."""

    delta: float
    low: float | None
    high: float | None
    """Ends of its interval; None, as the p-value, where only the difference is known."""
    p_value: float | None


def paired_difference(differences: np.ndarray, seeds: int = 1, confidence: float = 0.95) -> Change:
    """Difference of accuracy with its interval and exact p-value; the image is the unit.

    The interval is the adjusted Wald interval for matched pairs (Agresti & Min 2005, section 3): two pseudo images keep
    it valid where few images differ. It covers other test images. It does not cover another training run; the standard
    deviation over seeds does.

    Args:
        differences: `[n]` integers as in `sign_flip_p`, added up over `seeds` seeds.
    """
    n = len(differences)
    per_image = differences / seeds
    total, squares = float(per_image.sum()), float((per_image**2).sum()) + 1.0
    middle = total / (n + 2)
    half = normal_quantile(confidence) * math.sqrt(max(0.0, squares - total * total / (n + 2))) / (n + 2)
    return Change(total / n, middle - half, middle + half, sign_flip_p(differences))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of a family of tests by Holm's step-down correction (Holm 1979)."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def corrected(changes: Mapping[str, Change]) -> dict[str, Change]:
    """A family of changes with p-values corrected by `holm`."""
    adjusted = holm({name: change.p_value for name, change in changes.items() if change.p_value is not None})
    return {name: replace(change, p_value=adjusted.get(name)) for name, change in changes.items()}


def mean_and_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; the latter is None for a single value."""
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def front(costs: list[float], gains: list[float]) -> list[bool]:
    """For each point, whether it lies on the Pareto front: no other point is at least as good in both and differs."""
    return [
        not any(c <= cost and g >= gain and (c < cost or g > gain) for c, g in zip(costs, gains, strict=True))
        for cost, gain in zip(costs, gains, strict=True)
    ]

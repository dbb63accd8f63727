"""Intervals of an accuracy and of a paired difference, exact tests, and the correction for several tests."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

PSEUDO_IMAGES = 2
"""Images of the mean that are added to each class in its variance; see `recall_interval`."""
STEPS, MOST_STEPS = 2**10, 2**18
"""Steps of the lattice of `weighted_sign_flip_p` from 0 to the largest total: for each image, and at most."""


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


def recall_interval(correct: np.ndarray, images: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of the mean recall over classes, which is balanced accuracy.

    The classes are independent binomials, so this is the score interval of a linear combination of proportions (Martin
    Andres, Alvarez Hernandez & Herranz Tejedor 2011, Statistical Methods in Medical Research 20): an end is the mean of
    the likeliest recalls that lie z standard deviations, which they imply, from the observed mean. With one class it is
    Wilson's interval. Unlike a bootstrap over images, it has a width where no image of a class is classified correctly.

    Few images understate the variance within their class, which matters where there are many such classes. So the
    variance takes each class with `PSEUDO_IMAGES` more, of the mean recall. The ends never lie beyond the mean of the
    classes' own Wilson intervals.

    Args:
        correct: `[classes]`, images of each class that are classified correctly, of `images`; no class is empty.

    Returns:
        Low and high ends, as fractions.
    """
    z = normal_quantile(confidence)

    def lower(correct: np.ndarray) -> float:
        observed = (correct / images).mean()
        low, high = -30.0, 60.0  # logarithm of the Lagrange multiplier that holds the mean below the observed one
        recalls = correct / images
        for _ in range(80):
            pull = math.exp((low + high) / 2)
            root = np.sqrt((images + pull) ** 2 - 4 * pull * correct)
            recalls = np.minimum(2 * correct / (images + pull + root), 1)
            mean = recalls.mean()
            drawn = (images * recalls + PSEUDO_IMAGES * mean) / (images + PSEUDO_IMAGES)
            variance = (drawn * (1 - drawn) / images).sum() / len(images) ** 2
            if (observed - mean) ** 2 <= z * z * variance:
                low = math.log(pull)
            else:
                high = math.log(pull)
        own = [wilson_interval(right, n, confidence)[0] for right, n in zip(correct, images, strict=True)]
        return max(float(recalls.mean()), float(np.mean(own)))

    return lower(correct), 1 - lower(images - correct)


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


def weighted_sign_flip_p(differences: np.ndarray, weights: np.ndarray) -> float:
    """As `sign_flip_p` where images count differently, as they do in balanced accuracy.

    The weighted differences are rounded to a lattice, on which the Fourier transform of the total's distribution is the
    product of cosines; totals within the rounding error of the observed one count as it does. The p-value is so exact
    but for a few per cent of itself upwards, and 1e-12.

    Args:
        differences: `[n]` integers as in `sign_flip_p`.
        weights: `[n]` above zero; only their ratios matter.
    """
    moved = differences != 0
    differences, weights = differences[moved], weights[moved]
    if len(weights) == 0 or (weights == weights[0]).all():
        return sign_flip_p(differences)
    sizes, reach = weights * np.abs(differences), min(STEPS * len(weights), MOST_STEPS)
    steps = np.rint(sizes * reach / sizes.sum()).astype(np.int64)
    points = 1 << int(2 * steps.sum()).bit_length()
    angles = 2 * np.pi / points * np.arange(points // 2 + 1)
    transform = np.ones_like(angles)
    for step, images in zip(*np.unique(steps, return_counts=True), strict=True):
        transform *= np.cos(step * angles) ** images
    chances = np.fft.irfft(transform, points)  # of the totals 0, 1, ..., and of the negative ones from the end
    totals = np.minimum(np.arange(points), points - np.arange(points))
    least = abs(int((np.sign(differences) * steps).sum())) - 1.5 * math.sqrt(len(steps))
    return float(np.clip(chances[totals >= least].sum(), 1e-12, 1))


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


def paired_difference(
    differences: np.ndarray, seeds: int = 1, confidence: float = 0.95, labels: np.ndarray | None = None
) -> Change:
    """Difference of accuracy, or of balanced accuracy, with its interval and exact p-value; the image is the unit.

    The interval is the adjusted Wald interval for matched pairs (Agresti & Min 2005, section 3): two pseudo images keep
    it valid where few images differ. In balanced accuracy the classes are strata, which share the two (as Price &
    Bonett 2004 do in a linear function of proportions). It covers other test images. It does not cover another training
    run; the standard deviation over seeds does.

    Args:
        differences: `[n]` integers as in `sign_flip_p`, added up over `seeds` seeds.
        labels: `[n]` integers, the class of each image, for balanced accuracy.
    """
    _, place, images = np.unique(
        np.zeros(len(differences), np.int64) if labels is None else labels, return_inverse=True, return_counts=True
    )
    classes, per_image = len(images), differences / seeds
    totals = np.bincount(place, per_image)
    squares, more = np.bincount(place, per_image**2) + 1 / classes, images + 2 / classes
    middle = float((totals / more).mean())
    means = (totals + PSEUDO_IMAGES * middle) / (more + PSEUDO_IMAGES)
    variances = np.maximum(0, squares / more - means**2) / more
    half = normal_quantile(confidence) * math.sqrt(variances.sum()) / classes
    p_value = weighted_sign_flip_p(differences, 1 / images[place])
    return Change(float((totals / images).mean()), middle - half, middle + half, p_value)


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

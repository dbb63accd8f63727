"""Selective classification: answer only where the confidence is high enough, so that answers are right more often."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


@dataclass(frozen=True)
class Threshold:
    """Images whose confidence is at least `confidence` are answered."""

    confidence: float
    coverage: float
    """Share of the images that are answered."""
    accuracy: float
    """Share of those answered that are right."""
    answered: int


def thresholds(confidence: np.ndarray, right: np.ndarray) -> list[Threshold]:
    """Every way to divide these images by their confidence, the lowest threshold first.

    That is the risk-coverage curve of El-Yaniv and Wiener (JMLR 11, 2010, section 2).

    Args:
        confidence: of each image, float `[N]`.
        right: whether its class is the right one, bool `[N]`.
    """
    values, counts = np.unique(confidence, return_counts=True)
    answered = np.cumsum(counts[::-1])[::-1]
    rights = np.cumsum(right[np.argsort(-confidence, kind="stable")])[answered - 1]
    return [
        Threshold(value, n / len(confidence), n_right / n, n)
        for value, n, n_right in zip(values.tolist(), answered.tolist(), rights.tolist(), strict=True)
    ]


def lowest_threshold(curve: list[Threshold], accuracy: float) -> Threshold | None:
    """The lowest at which at least this share of the answers is right; None where no threshold reaches it.

    It is chosen and counted on the same images, so on new ones the answers are right a little less often.
    """
    return next((threshold for threshold in curve if threshold.accuracy >= accuracy), None)


def best_threshold(curve: list[Threshold]) -> Threshold:
    """The one with the largest accuracy, and of several the one that answers most."""
    return max(curve, key=lambda threshold: (threshold.accuracy, threshold.coverage))


def proportion(name: str, right: np.ndarray, confidence: float) -> dict[str, float]:
    """Share of True with Wilson's score interval."""
    result = binomtest(int(right.sum()), len(right))
    low, high = result.proportion_ci(confidence, method="wilson")
    return {name: float(right.mean()), f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}

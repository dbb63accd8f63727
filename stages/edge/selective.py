"""Selective classification: answer only images with a high confidence, so that more of the answers are right."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Threshold:
    """The classifier answers the images whose confidence is at least `confidence`."""

    confidence: float
    coverage: float  # fraction of the images that it answers
    accuracy: float  # fraction of the answers that are right
    answered: int


def thresholds(confidence: np.ndarray, right: np.ndarray) -> list[Threshold]:
    """Every threshold that divides these images differently, the lowest first.

    They form the risk-coverage curve of El-Yaniv and Wiener (JMLR 11, 2010, section 2). `confidence` is float `[N]`;
    `right` is bool `[N]`, True where the predicted class is the label.
    """
    values, counts = np.unique(confidence, return_counts=True)
    answered = np.cumsum(counts[::-1])[::-1]
    rights = np.cumsum(right[np.argsort(-confidence, kind="stable")])[answered - 1]
    return [
        Threshold(value, n / len(confidence), n_right / n, n)
        for value, n, n_right in zip(values.tolist(), answered.tolist(), rights.tolist(), strict=True)
    ]


def lowest_threshold(curve: list[Threshold], accuracy: float) -> Threshold | None:
    """The lowest threshold with at least this accuracy; None if there is none.

    The same images choose the threshold and measure its accuracy, so new images have a slightly lower accuracy.
    """
    return next((threshold for threshold in curve if threshold.accuracy >= accuracy), None)


def proportion(name: str, right: int, n: int, confidence: float) -> dict[str, float]:
    """`right / n` with the Wilson score interval."""
    from scipy.stats import binomtest  # here, because it takes a second that `--help` can do without

    low, high = binomtest(right, n).proportion_ci(confidence, method="wilson")
    return {name: right / n, f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}

"""The tables that DVC's own plots read besides `variants.csv`, and the confusion matrix."""

import numpy as np

from stages.reporting.inputs import CompletedRun
from stages.reporting.rows import Choices, Row

CONFUSION_CLASSES = 50
"""The whole confusion matrix is shown up to this number of classes; beyond that, only this many of the worst."""


Table = tuple[tuple[str, ...], list[Row]]
"""Columns and rows of one CSV file; the rows may be empty."""


def plot_tables(run: CompletedRun, choices: Choices) -> dict[str, Table]:
    """By file name without its suffix."""
    return {"training": _training(run, choices.headline), "confusion": _confusion(run, choices.headline)}


def _training(run: CompletedRun, variant: str) -> Table:
    """All epochs that led to a variant, counted from 1: dense training, pruning, and the quantizer's recovery."""
    stages = (run.params.model_of(variant), run.params.variants[variant].pruned, variant)
    steps = [(name, row) for name in stages for row in run.curves.get(name, [])]
    columns = ("epoch", "network", "validation_top1", "validation_balanced_accuracy", "training_loss")
    lines = [row | {"network": name, "epoch": epoch} for epoch, (name, row) in enumerate(steps, 1)]
    return columns, [{column: line[column] for column in columns} for line in lines]


def _confusion(run: CompletedRun, variant: str) -> Table:
    """A line for each test image, of at most `CONFUSION_CLASSES` classes; DVC's `confusion` template counts them."""
    shown = set(run.variants[variant].worst_classes[:CONFUSION_CLASSES])
    pairs = zip(run.labels.tolist(), run.variants[variant].predicted.tolist(), strict=True)
    lines = [{"actual": run.classes[a], "predicted": run.classes[p]} for a, p in pairs if a in shown]
    return ("actual", "predicted"), lines


def confusion_counts(run: CompletedRun, variant: str) -> np.ndarray:
    """`[classes, classes]` integers: true class by predicted class."""
    k = len(run.classes)
    pairs = run.labels * k + run.variants[variant].predicted
    return np.bincount(pairs, minlength=k * k)[: k * k].reshape(k, k)

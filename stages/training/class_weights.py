"""Weights of the classes in the loss: with them, every class counts the same however few images it has."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from stages.common.errors import UserError


def refuse_empty_classes(labels: np.ndarray, names: Sequence[str]) -> None:
    """Raise a `UserError` if a class has no image, since its weight would be infinite.

    Args:
        labels: int64 `[N]`: of the training part.
        names: of all classes.
    """
    if empty := [name for name, count in zip(names, _counts(labels, len(names)), strict=True) if not count]:
        raise UserError(
            f"finetune.class_weights = 'balanced': the training part has no image of {', '.join(empty)}: add images,"
            " remove the class from the data, or set class_weights: none"
        )


def balanced_weights(labels: np.ndarray, classes: int) -> torch.Tensor:
    """float32 `[classes]`: N / (classes * images of the class), as scikit-learn's `balanced`.

    The weight of a class without images, which no label uses, is that of a class with one image.
    """
    return torch.from_numpy(len(labels) / (classes * np.maximum(_counts(labels, classes), 1))).float()


def weighted(targets: torch.Tensor, weights: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Targets whose cross entropy is that of each image, multiplied by the weight of its class.

    The weight multiplies the whole loss of an image, smoothed mass included. torch's `weight` instead multiplies the
    mass on each class, so that label smoothing would pull all images to the rare classes; and it divides by the weights
    of the batch, so that a rare image would count less the more of them a batch holds.

    Args:
        targets: int64 `[N]`, or mixed by timm and smoothed already, `[N, classes]`.
        weights: float32 `[classes]`. A mixed image has each label's weight in proportion.
        smoothing: label smoothing.

    Returns:
        float32 `[N, classes]`, smoothed; a row adds up to the image's weight.
    """
    if targets.dim() == 1:
        shares = F.one_hot(targets, len(weights)).float()
    else:
        shares = (targets - smoothing / len(weights)) / (1 - smoothing)
    shares = shares * weights
    return (1 - smoothing) * shares + smoothing / len(weights) * shares.sum(1, keepdim=True)


def _counts(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=classes)

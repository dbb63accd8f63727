"""Logits of a classifier over stored images, in batches, and their accuracy."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

EVALUATION_BATCH = 256
VALIDATION = ("validation_top1", "validation_balanced_accuracy")
"""The figures of `Accuracy` in the `metrics` of a model artifact."""
NAMED = 5
"""Classes that a warning names at most."""


@torch.no_grad()
def predict_logits(
    classifier: nn.Module,
    images: np.ndarray,
    batch_size: int,
    device: torch.device | str = "cpu",
    autocast: bool = False,
) -> np.ndarray:
    """Run a `networks.preprocess.Classifier` in evaluation mode.

    Args:
        images: uint8 `[N, H, W, C]`; memory-mapped images are read one batch at a time.
        autocast: compute in bfloat16 where torch considers it safe.

    Returns:
        float32 `[N, classes]`.
    """
    mode = classifier.training
    classifier.eval()
    device = torch.device(device)
    batches = []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        for start in range(0, len(images), batch_size):
            pixels = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
            batches.append(classifier(pixels).float())
    classifier.train(mode)
    return torch.cat(batches).cpu().numpy()


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of images whose largest logit is the one of their label."""
    return float((logits.argmax(1) == labels).mean())


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a classifier on validation images, by class."""

    images: np.ndarray
    """int64 `[classes]`: images of each class."""
    right: np.ndarray
    """int64 `[classes]`: how many of them are classified correctly."""
    predicted: list[int]
    """The classes that the classifier predicts at all."""

    @property
    def top1(self) -> float:
        return float(self.right.sum() / self.images.sum())

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over the classes that have images."""
        present = self.images > 0
        return float((self.right[present] / self.images[present]).mean())

    @property
    def metrics(self) -> dict[str, float]:
        return dict(zip(VALIDATION, (self.top1, self.balanced_accuracy), strict=True))

    @property
    def text(self) -> str:
        return f"validation top-1 {100 * self.top1:.2f} %, balanced accuracy {100 * self.balanced_accuracy:.2f} %"

    def never_right(self, names: Sequence[str]) -> list[str]:
        """The classes that have images, of which none is classified correctly."""
        return [names[k] for k in np.flatnonzero((self.images > 0) & (self.right == 0)).tolist()]

    def warnings(self, names: Sequence[str], before: Collection[str] = ()) -> list[str]:
        """Sentences about a classifier that gives up classes; empty if all is well.

        Args:
            names: of the classes.
            before: classes that the parent network never got right; they are no news.
        """
        if len(self.predicted) == 1 and (self.images > 0).sum() > 1:
            return [f"every validation image is classified as {names[self.predicted[0]]}"]
        lost = [name for name in self.never_right(names) if name not in before]
        counts = dict(zip(names, self.images.tolist(), strict=True))
        named = ", ".join(f"{name} (0 of {counts[name]})" for name in lost[:NAMED])
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        return [f"no validation image of these classes is classified correctly: {named}{more}"] if lost else []


def accuracy_of(logits: np.ndarray, labels: np.ndarray) -> Accuracy:
    """The accuracy of logits `[N, classes]` for labels int64 `[N]`."""
    predicted, classes = logits.argmax(1), logits.shape[1]
    right = np.bincount(labels[predicted == labels], minlength=classes)
    return Accuracy(np.bincount(labels, minlength=classes), right, np.unique(predicted).tolist())

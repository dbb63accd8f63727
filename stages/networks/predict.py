"""Logits of a classifier over stored images, in batches."""

import numpy as np
import torch
from torch import nn

EVALUATION_BATCH = 256


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

"""Knowledge distillation: a student learns from the softened outputs of a teacher (arXiv 1503.02531)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Distillation:
    """A teacher and its part in the loss: (1 - w) * cross entropy + w * T^2 * KL(teacher || student)."""

    teacher: nn.Module
    """Maps the student's inputs to logits of the same classes."""
    weight: float
    """w, in [0, 1]."""
    temperature: float
    """T, above 0. A higher temperature gives the teacher's small probabilities more weight."""


def soft_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch, in float32.

    T^2 compensates the effect of the temperature on the size of the gradients (section 2 of the paper). The KL
    divergence has the gradient of the paper's cross entropy with soft targets, and is 0 if student and teacher agree.

    Args:
        logits, teacher_logits: `[N, classes]`.
    """
    student = F.log_softmax(logits.float() / temperature, 1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

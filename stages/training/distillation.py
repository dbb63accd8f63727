"""Knowledge distillation: a student learns from the softened outputs of a teacher (arXiv 1503.02531)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Distillation:
    """Who teaches, and how much of the loss listens: (1 - w) * cross entropy + w * T^2 * KL(teacher || student)."""

    teacher: nn.Module
    """Takes the student's inputs and gives logits of the same classes; shares no parameter with the student."""
    weight: float
    """w, in [0, 1]; at 0 the teacher is not asked."""
    temperature: float
    """T, above 0: the higher, the more the teacher's small probabilities count."""


def freeze(teacher: nn.Module, student: nn.Module) -> None:
    """Put the teacher into evaluation mode for good, without gradients.

    Raises:
        ValueError: if it shares parameters with the student, which would be frozen too.
    """
    if {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
        raise ValueError("the teacher shares parameters with the network that is trained: give a copy")
    teacher.eval().requires_grad_(False)


def soft_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch.

    T^2 undoes what the temperature does to the size of the gradients (section 2 of the paper). The KL divergence has
    the gradient of the paper's cross entropy with soft targets, and is 0 where student and teacher agree.

    Args:
        logits, teacher_logits: `[N, classes]`; computed in float32.
    """
    student = F.log_softmax(logits.float() / temperature, 1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_training import weights

from stages.training.distillation import Distillation, soft_loss
from stages.training.trainer import seed_epoch


@pytest.fixture
def teacher(network) -> nn.Module:
    """Another network of the same kind with confident outputs, in training mode."""
    teacher = copy.deepcopy(network)
    torch.manual_seed(5)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return teacher.train()


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_soft_loss_equals_a_hand_computation(temperature):
    student, teacher = [[1.0, -2.0, 0.5], [0.0, 0.0, 3.0]], [[2.0, 0.0, -1.0], [1.0, 4.0, 0.0]]
    expected = 0.0
    for z, v in zip(student, teacher, strict=True):
        q, p = softmax(z, temperature), softmax(v, temperature)
        expected += temperature**2 * sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True)) / len(student)
    found = soft_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    logits = torch.tensor(student)
    assert soft_loss(logits, logits + 3, temperature).item() == pytest.approx(0, abs=1e-6)  # a shift changes nothing


def test_at_a_high_temperature_distillation_matches_logits():
    """Equation 4 of the paper, times T^2: for logits of mean 0 the gradient tends to (z - v) / classes."""
    z, v = torch.randn(1, 10), torch.randn(1, 10)
    z, v = (z - z.mean()).requires_grad_(), v - v.mean()
    soft_loss(z, v, 1000.0).backward()
    assert torch.allclose(z.grad, (z - v).detach() / 10, atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_is_the_weighted_sum_of_both_on_the_same_batch(network, teacher, fit, parts, recipe, precision):
    changes = {"epochs": 1, "batch_size": 96, "mixup": 0.0, "label_smoothing": 0.1, "precision": precision}
    seen: dict[str, list[tuple]] = {"network": [], "teacher": []}

    def record(name: str):
        def hook(module, inputs, output):
            if module.training or name == "teacher":  # not the validation
                seen[name].append((inputs[0], output.detach(), module.training))

        return hook

    network.register_forward_hook(record("network"))
    teacher.register_forward_hook(record("teacher"))
    trained = fit(network, recipe.model_copy(update=changes), distillation=Distillation(teacher, 0.3, 4.0))
    [(x, logits, _)], [(teacher_x, teacher_logits, teacher_trains)] = seen["network"], seen["teacher"]
    assert torch.equal(x, teacher_x)
    assert not teacher_trains
    assert teacher_logits.dtype == logits.dtype == getattr(torch, precision)
    order = torch.randperm(96, generator=seed_epoch(3, 0))
    labels = torch.from_numpy(parts[0].labels)[order]  # one batch of all images, in the epoch's order
    hard = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
    student, soft_targets = (logits.float() / 4).log_softmax(1), (teacher_logits.float() / 4).softmax(1)
    soft = 16 * F.kl_div(student, soft_targets, reduction="batchmean")
    assert trained.curve[0]["training_loss"] == pytest.approx((0.7 * hard + 0.3 * soft).item(), abs=2e-6)


def test_the_teacher_never_changes(network, teacher, fit):
    teacher.register_module("norm_with_statistics", nn.BatchNorm2d(3))
    forward = teacher.forward
    teacher.forward = lambda x: forward(teacher.norm_with_statistics(x))
    before = weights(teacher)
    fit(network, distillation=Distillation(teacher, 0.5, 2.0))
    assert weights(teacher) == before
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_weight_and_temperature_change_the_result(network, teacher, fit):
    def result(*settings: float) -> bytes:
        distillation = Distillation(copy.deepcopy(teacher), *settings) if settings else None
        return weights(fit(copy.deepcopy(network), distillation=distillation).network)

    assert len({result(), result(0.5, 2.0), result(0.5, 4.0)}) == 3


def test_with_weight_1_the_student_learns_the_teachers_answers_instead_of_the_labels(network, fit, recipe):
    class Contrary(nn.Module):
        """Answers the wrong class with certainty: bright images are class 1."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            brightness = x.mean((1, 2, 3))
            return torch.stack([brightness, -brightness], 1) * 5

    recipe = recipe.model_copy(update={"epochs": 6, "mixup": 0.0, "random_erasing": 0.0})
    trained = fit(network, recipe, keep="last", distillation=Distillation(Contrary(), 1.0, 1.0))
    assert trained.validation_top1 < 0.1

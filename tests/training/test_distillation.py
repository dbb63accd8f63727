import copy
import math

import pytest
import torch
import torch.nn.functional as F
from stages.training.loop import train
from torch import nn

from stages.common.errors import UserError
from stages.params.base import Base
from stages.training import loop
from stages.training.checkpoint import load_checkpoint
from stages.training.distillation import Distillation, freeze, soft_loss

BASE = Base(device="cpu", threads=1)


def run(network, parts, preprocess, recipe, **more):
    return train(network, *parts, preprocess, recipe, base=BASE, seed=3, title="test", **more)


def weights(network) -> bytes:
    return b"".join(t.numpy().tobytes() for t in network.state_dict().values())


@pytest.fixture
def teacher(network) -> nn.Module:
    """Another network of the same kind, with opinions, in training mode as one that was just built."""
    teacher = copy.deepcopy(network)
    torch.manual_seed(5)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return teacher.train()


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_soft_loss_is_that_of_a_hand_computation(temperature):
    student, teacher = [[1.0, -2.0, 0.5], [0.0, 0.0, 3.0]], [[2.0, 0.0, -1.0], [1.0, 4.0, 0.0]]
    by_hand = 0.0
    for z, v in zip(student, teacher, strict=True):
        q, p = softmax(z, temperature), softmax(v, temperature)
        by_hand += temperature**2 * sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True)) / len(student)
    found = soft_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert found.item() == pytest.approx(by_hand, rel=1e-5)


def test_a_student_that_agrees_has_no_soft_loss():
    logits = torch.randn(4, 10)
    assert soft_loss(logits, logits + 3, 2.0).item() == pytest.approx(0, abs=1e-6)  # softmax knows no common shift


def test_at_a_high_temperature_distillation_matches_logits():
    """Equation 4 of the paper, times T^2: for logits of mean 0 the gradient tends to (z - v) / classes."""
    z, v = torch.randn(1, 10), torch.randn(1, 10)
    z, v = (z - z.mean()).requires_grad_(), v - v.mean()
    soft_loss(z, v, 1000.0).backward()
    assert torch.allclose(z.grad, (z - v).detach() / 10, atol=1e-3)


def test_a_teacher_that_shares_parameters_with_the_network_is_refused(network):
    with pytest.raises(ValueError, match="shares parameters"):
        freeze(nn.Sequential(network), network)
    assert network.training


def test_the_loss_is_the_weighted_sum_of_both_and_the_teacher_sees_the_networks_own_batch(
    network, teacher, parts, preprocess, recipe
):
    recipe = recipe.model_copy(update={"epochs": 1, "batch_size": 96, "mixup": 0.0, "label_smoothing": 0.1})
    seen: dict[str, list[tuple]] = {"network": [], "teacher": []}

    def record(name):
        def hook(module, inputs, output):
            if module.training or name == "teacher":  # not the validation
                seen[name].append((inputs[0], output.detach(), module.training))

        return hook

    network.register_forward_hook(record("network"))
    teacher.register_forward_hook(record("teacher"))
    trained = run(network, parts, preprocess, recipe, distillation=Distillation(teacher, 0.3, 4.0))
    [(x, logits, _)], [(teacher_x, teacher_logits, teacher_trains)] = seen["network"], seen["teacher"]
    assert torch.equal(x, teacher_x)
    assert not teacher_trains
    order = torch.randperm(96, generator=loop._seed_epoch(3, 0))
    labels = torch.from_numpy(parts[0].labels)[order]  # one batch of all images, in the epoch's order
    hard = F.cross_entropy(logits, labels, label_smoothing=0.1)
    soft = 16 * F.kl_div((logits / 4).log_softmax(1), (teacher_logits / 4).softmax(1), reduction="batchmean")
    assert trained.curve[0]["training_loss"] == pytest.approx((0.7 * hard + 0.3 * soft).item(), abs=2e-6)


def test_the_teacher_is_never_changed(network, teacher, parts, preprocess, recipe):
    teacher.register_module("norm_that_counts", nn.BatchNorm2d(3))
    forward = teacher.forward
    teacher.forward = lambda x: forward(teacher.norm_that_counts(x))
    before = weights(teacher)
    run(network, parts, preprocess, recipe, distillation=Distillation(teacher, 0.5, 2.0))
    assert weights(teacher) == before
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_distillation_changes_the_result_and_at_weight_0_no_bit_of_it(network, teacher, parts, preprocess, recipe):
    def result(distillation: Distillation | None) -> bytes:
        network_, teacher_ = copy.deepcopy(network), copy.deepcopy(teacher)
        if distillation is not None:
            distillation = Distillation(teacher_, distillation.weight, distillation.temperature)
        return weights(run(network_, parts, preprocess, recipe, distillation=distillation).network)

    plain = result(None)
    asked = []
    teacher.register_forward_hook(lambda *_: asked.append(True))
    assert result(Distillation(teacher, 0.0, 2.0)) == plain
    assert not asked
    assert len({plain, result(Distillation(teacher, 0.5, 2.0)), result(Distillation(teacher, 0.5, 4.0))}) == 3


def test_with_all_the_weight_on_the_teacher_the_student_learns_its_answers_instead_of_the_labels(
    network, teacher, parts, preprocess, recipe
):
    class Contrary(nn.Module):
        """Says the other class with certainty: bright images are class 1."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            brightness = x.mean((1, 2, 3))
            return torch.stack([brightness, -brightness], 1) * 5

    recipe = recipe.model_copy(update={"epochs": 6, "mixup": 0.0, "random_erasing": 0.0})
    trained = run(network, parts, preprocess, recipe, keep="last", distillation=Distillation(Contrary(), 1.0, 1.0))
    assert trained.validation_top1 < 0.1


def test_the_teacher_computes_in_the_precision_of_the_training(network, teacher, parts, preprocess, recipe):
    kinds = []
    teacher.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    recipe = recipe.model_copy(update={"epochs": 1, "precision": "bfloat16"})
    run(network, parts, preprocess, recipe, distillation=Distillation(teacher, 0.5, 2.0))
    assert set(kinds) == {torch.bfloat16}


@pytest.mark.parametrize("mixing", [{"mixup": 0.2}, {"mixup": 0.0, "cutmix": 1.0}])
def test_an_interrupted_distillation_ends_bit_for_bit_where_the_uninterrupted_one_does_and_keeps_no_teacher(
    network, teacher, parts, preprocess, recipe, tmp_path, monkeypatch, mixing
):
    recipe = recipe.model_copy(update=mixing)

    def result(**more) -> bytes:
        distillation = Distillation(copy.deepcopy(teacher), 0.5, 2.0)
        return weights(
            run(copy.deepcopy(network), parts, preprocess, recipe, distillation=distillation, **more).network
        )

    whole = result()
    save, kept = loop.save_checkpoint, []

    def killed(folder, state):
        save(folder, state)
        kept.append(load_checkpoint(folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        result(checkpoints=tmp_path)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    assert result(checkpoints=tmp_path) == whole
    assert kept[0].keys() == {"epochs", "curve", "chosen", "run"}
    assert kept[0]["run"].keys() == {"network", "optimizers", "average"}


def test_a_distillation_whose_loss_is_not_finite_ends_with_a_clear_error(network, teacher, parts, preprocess, recipe):
    recipe = recipe.model_copy(update={"optimizer": "sgd", "learning_rate": 1e30})
    with pytest.raises(UserError, match="the loss became"):
        run(network, parts, preprocess, recipe, distillation=Distillation(teacher, 0.5, 2.0))
